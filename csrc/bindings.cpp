// alula._C: what is not a tensor op. No torch header is included here.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <chrono>

#include "cpu/isa.h"
#include "cpu/peak.h"

namespace py = pybind11;

namespace {

py::dict build_info() {
  py::dict info;
  info["version"] = ALULA_VERSION;
  info["compiler"] = ALULA_COMPILER;
  info["torch_abi"] = ALULA_TORCH_ABI;
  info["cuda"] = py::none();
  info["cuda_reason"] = ALULA_CUDA_REASON;
  return info;
}

// One core's rate, in units of 1e9 operations a second; 0 where the instruction set in use has no such instruction.
double peak_gflops(const std::string& kind, double seconds) {
  const alula::PeakKernels& kernels = alula::peak_kernels();
  if (kind != "fp32_fma" && kind != "bf16_dot") {
    throw py::value_error("unknown kind '" + kind + "'; accepted: fp32_fma, bf16_dot");
  }
  const auto run = kind == "fp32_fma" ? kernels.fp32_fma : kernels.bf16_dot;
  py::gil_scoped_release release;
  using Clock = std::chrono::steady_clock;
  float sink = 0;
  double operations = run(100'000, &sink);
  if (operations == 0) return 0;
  operations = 0;
  const auto start = Clock::now();
  double elapsed = 0;
  do {
    operations += run(100'000, &sink);
    elapsed = std::chrono::duration<double>(Clock::now() - start).count();
  } while (elapsed < seconds);
  return operations / elapsed / 1e9;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Build, instruction set and machine facts of alula's compiled library.";
  m.def("build_info", &build_info, "What this build is: version, compiler, torch ABI, CUDA or why there is none.");
  m.def("isa", [] { return alula::isa_name(alula::current_isa()); }, "The instruction set that the kernels use.");
  m.def("available_isas", &alula::available_isas, "The instruction sets that this CPU has, slowest first.");
  m.def("force_isa", &alula::force_isa, py::arg("name"),
        "Use this instruction set from now on. Raises ValueError for one that is unknown or that this CPU lacks.");
  m.def("peak_gflops", &peak_gflops, py::arg("kind"), py::arg("seconds") = 0.2,
        "One core's measured rate in GFLOP/s, kind 'fp32_fma' or 'bf16_dot'; the GIL is released.");
}
