// alula._C: what is not a tensor op. No torch header is included here.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <chrono>

#include "core/build_facts.h"
#include "cpu/isa.h"
#include "cpu/peak.h"
#include "cuda/device.h"
#include "cuda/id_faults.h"
#include "ops/block_plan.h"
#include "ops/decoder_blocks.h"

namespace py = pybind11;

namespace {

py::dict build_info() {
  const alula::BuildFacts& build = alula::build_facts();
  const std::string archs = alula::cuda_archs();
  py::dict info;
  info["version"] = build.version;
  info["compiler"] = build.compiler;
  info["torch_abi"] = build.torch_abi;
  info["cuda"] = archs.empty() ? py::object(py::none()) : py::str(build.cuda_version);
  info["cuda_archs"] = archs;
  info["cuda_reason"] = build.cuda_reason;
  return info;
}

// One core's rate, in units of 1e9 operations a second; 0 where the instruction set in use has no such instruction.
double peak_gflops(const std::string& kind, double seconds) {
  const alula::PeakKernels& kernels = alula::peak_kernels();
  if (kind != "fp32_fma" && kind != "bf16_dot" && kind != "int8_dot") {
    throw py::value_error("unknown kind '" + kind + "'; accepted: fp32_fma, bf16_dot, int8_dot");
  }
  const auto run = kind == "fp32_fma" ? kernels.fp32_fma : kind == "bf16_dot" ? kernels.bf16_dot : kernels.int8_dot;
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

using Indices = py::array_t<int32_t, py::array::c_style | py::array::forcecast>;

Indices to_array(const std::vector<int32_t>& values, std::vector<py::ssize_t> shape) {
  return Indices(std::move(shape), values.data());
}

alula::BlockPlan reference_plan(const Indices& random) {
  if (random.ndim() != 3)
    throw py::value_error("random blocks have three dimensions: [heads, blocks - 2, random blocks]");
  return alula::reference_plan(random.shape(1) + 2, random.shape(0), random.shape(2), random.data());
}

alula::BlockPlan pattern_plan(int64_t num_blocks, int64_t num_heads, int64_t window,
                              const std::vector<int64_t>& global_blocks, const std::vector<int64_t>& token_blocks,
                              int64_t num_random_blocks, uint64_t seed, bool is_causal) {
  return alula::pattern_plan({.num_heads = num_heads,
                              .num_blocks = num_blocks,
                              .window = window,
                              .global_blocks = global_blocks,
                              .token_blocks = token_blocks,
                              .num_random_blocks = num_random_blocks,
                              .seed = seed,
                              .is_causal = is_causal});
}

void bind_block_plan(py::module_& m) {
  using alula::BlockPlan;
  py::class_<BlockPlan>(m, "BlockPlan", "Lists of key blocks and counts; alula.BlockPlan is what users see.")
      .def_static("reference", &reference_plan, py::arg("random"),
                  "BigBird's pattern with these random blocks, int32 [heads, blocks - 2, random blocks].")
      .def_static("pattern", &pattern_plan, py::kw_only(), py::arg("num_blocks"), py::arg("num_heads"),
                  py::arg("window"), py::arg("global_blocks"), py::arg("token_blocks"), py::arg("num_random_blocks"),
                  py::arg("seed"), py::arg("is_causal"), "A pattern of window, global and random blocks.")
      .def_static("listed", &alula::listed_plan, py::arg("num_blocks"), py::arg("num_heads"), py::arg("starts"),
                  py::arg("blocks"), "Lists as given; a block that occurs k times in a list gets the count k.")
      .def_readonly("num_heads", &BlockPlan::num_heads)
      .def_readonly("num_blocks", &BlockPlan::num_blocks)
      .def_property_readonly(
          "starts", [](const BlockPlan& p) { return to_array(p.starts, {p.num_heads, p.num_blocks + 1}); },
          "int32 [heads, blocks + 1]: where each list begins in entries.")
      .def_property_readonly(
          "entries",
          [](const BlockPlan& p) { return to_array(p.entries, {static_cast<py::ssize_t>(p.entries.size() / 2), 2}); },
          "int32 [total, 2]: key block, count.")
      .def(
          "counts", [](const BlockPlan& p) { return to_array(p.counts(), {p.num_heads, p.num_blocks, p.num_blocks}); },
          "int32 [heads, blocks, blocks]: counts, 0 where not listed, -1 for pairs with a global token only.");
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Build, instruction set and machine facts of alula's compiled library, and block plans.";
  m.def("build_info", &build_info, "What this build is: version, compiler, torch ABI, CUDA or why there is none.");
  m.def("isa", [] { return alula::isa_name(alula::current_isa()); }, "The instruction set that the kernels use.");
  m.def("available_isas", &alula::available_isas, "The instruction sets that this CPU has, slowest first.");
  m.def("force_isa", &alula::force_isa, py::arg("name"),
        "Use this instruction set from now on. Raises ValueError for one that is unknown or that this CPU lacks.");
  m.def("missing_cuda_code", &alula::missing_code, py::arg("major"), py::arg("minor"), py::arg("archs"),
        "Why a GPU of this compute capability cannot run code built for `archs` ('80 90a 120+'); empty where it can.");
  m.def("take_cuda_id_fault", &alula::take_id_fault, py::arg("device_index"),
        "Which ids a kernel of this GPU found outside their table since the last time; empty: none.");
  m.def("release_decoder_blocks", &alula::release_decoder_blocks, py::arg("blocks"),
        "Forget a stack of blocks that torch.ops.alula.bind_decoder_blocks made.");
  m.def("peak_gflops", &peak_gflops, py::arg("kind"), py::arg("seconds") = 0.2,
        "One core's measured rate in GFLOP/s, kind 'fp32_fma', 'bf16_dot' or 'int8_dot'; the GIL is released.");
  bind_block_plan(m);
}
