// choose_token: arguments from a request.
#include <vector>

#include "ops/choose_token.h"
#include "request.h"

namespace simt {
namespace {

using namespace alula;

void run_choose_token(const Request& r) {
  const ChooseTokenArgs args = {
      .dtype = r.dtype("dtype"),
      .scores = r.t("scores"),
      .drawn = r.t<const int64_t>("drawn"),
      .rows = r.i("rows"),
      .vocab_size = r.i("vocab_size"),
      .row_stride = r.i("vocab_size"),
      .pad_id = r.t<const int64_t>("pad_id"),
      .eos_ids = r.t<const int64_t>("eos_ids"),
      .num_eos = r.i("num_eos"),
      .advances = r.i("advances") != 0,
      .tokens = r.t<int64_t>("tokens"),
      .running = r.t<bool>("running"),
      .out = r.t<int64_t>("out"),
      .num_new = r.i("num_new"),
      .step = r.t<int64_t>("step"),
      .report = r.t<float>("report"),
      .lengths = r.t<int32_t>("lengths"),
      .positions = r.t<int64_t>("positions"),
      .slots = r.t<int32_t>("slots"),
      .seen = r.t<int32_t>("seen"),
  };
  CudaDevice device = *r.stream().device;
  device.num_multiprocessors = static_cast<int>(r.i("num_multiprocessors"));
  const ChooseTokenPlan plan = choose_token_plan(args, device);
  std::vector<ScoreKey> workspace(static_cast<size_t>(plan.num_keys));
  std::vector<uint32_t> counter(1);
  choose_token_cuda(args, plan, workspace.data(), counter.data(), r.stream());
  if (counter[0] != 0) throw std::runtime_error("the counter is left at " + std::to_string(counter[0]));
}

const Registration kChooseToken("choose_token", run_choose_token);

}  // namespace
}  // namespace simt
