// Which instruction set the kernels use: detected once, forced by ALULA_FORCE_ISA or alula._C.force_isa.
//
// Every csrc/ops/<op>_cpu.cpp is compiled once per level below, each time inside a namespace of that level's name, and
// exports one table of function pointers. ALULA_KERNELS picks the table of the level in use.
#pragma once

#include <string>
#include <vector>

// Slowest first. A level needs everything its line names; detection asks the CPU, and the operating system through it.
//   generic       any CPU the compiler knows (128-bit vectors of the compiler's own)
//   avx2          AVX2, FMA, F16C
//   avx512        AVX-512 F, BW, DQ, VL
//   avx512_bf16   avx512 and AVX512_BF16, AVX512_VNNI
#if defined(__x86_64__)
#define ALULA_FOR_EACH_ISA(X) X(generic) X(avx2) X(avx512) X(avx512_bf16)
#else
#define ALULA_FOR_EACH_ISA(X) X(generic)
#endif

namespace alula {

#define ALULA_ISA_ENUMERATOR(name) name,
enum class Isa : int { ALULA_FOR_EACH_ISA(ALULA_ISA_ENUMERATOR) };
#undef ALULA_ISA_ENUMERATOR

__attribute__((visibility("default"))) Isa current_isa();
__attribute__((visibility("default"))) std::string isa_name(Isa isa);
__attribute__((visibility("default"))) std::vector<std::string> available_isas();
// Throws std::invalid_argument for a name that is unknown or that this CPU does not have; says what is accepted.
__attribute__((visibility("default"))) void force_isa(const std::string& name);

}  // namespace alula

// Declares `Type name` once per level: the table of kernels that <op>_cpu.cpp defines.
#define ALULA_DECLARE_IN_ISA(isa, Type, name) \
  namespace isa {                             \
  extern const Type name;                     \
  }
#if defined(__x86_64__)
#define ALULA_DECLARE_KERNELS(Type, name)   \
  ALULA_DECLARE_IN_ISA(generic, Type, name) \
  ALULA_DECLARE_IN_ISA(avx2, Type, name)    \
  ALULA_DECLARE_IN_ISA(avx512, Type, name)  \
  ALULA_DECLARE_IN_ISA(avx512_bf16, Type, name)
#define ALULA_KERNELS(name) \
  (*std::array{&generic::name, &avx2::name, &avx512::name, &avx512_bf16::name}.at(static_cast<size_t>(current_isa())))
#else
#define ALULA_DECLARE_KERNELS(Type, name) ALULA_DECLARE_IN_ISA(generic, Type, name)
#define ALULA_KERNELS(name) (generic::name)
#endif
