#include "ops/choose_token.h"

#include <array>
#include <bit>

#include "core/cuda.h"
#include "core/refuse_grad.h"
#include "core/tensor.h"
#include "core/trace.h"

namespace alula {
namespace {

// A tensor of the rows' state, which the op writes: of this shape and type, contiguous, where the scores are.
void check_state(const Tensor& t, const char* name, ScalarType dtype, std::initializer_list<int64_t> sizes,
                 const char* meaning, Place place) {
  check_place(t, name, place);
  check_dtype(t, name, dtype, "the state of the rows");
  check_shape(t, name, sizes, meaning);
  ALULA_CHECK(t.is_contiguous(), name, " is not contiguous");
}

// A token that is taken is one that there is. On a GPU the embedding that reads it says so.
void check_drawn(const ChooseTokenArgs& args) {
  for (int64_t row = 0; args.drawn && row < args.rows; row++) {
    ALULA_CHECK(!args.running[row] || (args.drawn[row] >= 0 && args.drawn[row] < args.vocab_size), "drawn holds ",
                args.drawn[row], " for row ", row, "; accepted: 0 to ", args.vocab_size - 1);
  }
}

void choose_on_cpu(const ChooseTokenArgs& args) {
  check_drawn(args);
  const auto* scores = static_cast<const float*>(args.scores);
  const int64_t step = args.step[0];
  for (int64_t row = 0; row < args.rows; row++) {
    ScoreKey largest = 0;
    for (int64_t i = 0; i < args.vocab_size; i++) {
      const ScoreKey key = score_key(std::bit_cast<uint32_t>(scores[row * args.row_stride + i]), i);
      largest = key > largest ? key : largest;
    }
    choose_row(args, row, largest, step);
  }
  args.step[0] = step + 1;
}

void choose_on_cuda(const ChooseTokenArgs& args, const Tensor& like) {
  const CudaScope scope(like);
  ChooseTokenPlan plan = {};
  ALULA_CUDA_CALL(plan = choose_token_plan(args, *scope.stream().device));
  ALULA_TRACE_CUDA("choose_token", args.dtype, size_class(args.rows), " rows of ", args.vocab_size,
                   " scores, each over ", plan.splits, " blocks");
  const Tensor workspace = new_tensor({plan.num_keys}, ScalarType::Long, place_of(like, "scores"));
  [[maybe_unused]] uint32_t* const counter = zeroed_counters(like, scope, 1);
  ALULA_CUDA_CALL(
      choose_token_cuda(args, plan, static_cast<ScoreKey*>(workspace.mutable_data_ptr()), counter, scope.stream()));
}

void choose_token(const Tensor& scores, const OptionalTensor& drawn, const Tensor& pad_id,
                  const OptionalTensor& eos_ids, bool advances, const Tensor& tokens, const Tensor& running,
                  const Tensor& out, const Tensor& step, const Tensor& report, const Tensor& lengths,
                  const Tensor& positions, const Tensor& slots, const Tensor& seen) {
  const Place place = place_of(scores, "scores");
  value_dtype(scores, "scores");
  check_shape(scores, "scores", {-1, -1}, "[R, V]");
  const int64_t rows = scores.size(0), vocab_size = scores.size(1);
  ALULA_CHECK(vocab_size >= 1 && vocab_size <= 1 << 24, "scores has ", vocab_size, " columns; accepted: 1 to ", 1 << 24,
              " (a report holds ids in float32)");
  ALULA_CHECK(scores.stride(1) == 1, "scores has rows whose elements lie apart; they must be neighbours");
  if (drawn) check_state(*drawn, "drawn", ScalarType::Long, {rows}, "[R]", place);
  check_state(pad_id, "pad_id", ScalarType::Long, {1}, "[1]", place);
  if (eos_ids) check_state(*eos_ids, "eos_ids", ScalarType::Long, {-1}, "[ids]", place);
  check_state(tokens, "tokens", ScalarType::Long, {rows, 1}, "[R, 1]", place);
  check_state(running, "running", ScalarType::Bool, {rows}, "[R]", place);
  check_state(out, "out", ScalarType::Long, {rows, -1}, "[R, N]", place);
  check_state(step, "step", ScalarType::Long, {1}, "[1]", place);
  check_state(report, "report", ScalarType::Float, {2, rows}, "[2, R]", place);
  check_state(lengths, "lengths", ScalarType::Int, {rows}, "[R]", place);
  check_state(positions, "positions", ScalarType::Long, {rows, 1}, "[R, 1]", place);
  check_state(slots, "slots", ScalarType::Int, {rows, 1}, "[R, 1]", place);
  check_state(seen, "seen", ScalarType::Int, {rows}, "[R]", place);
  // The CPU looks at float32: this op is there to be tested, its speed is of no use there.
  const Tensor given = place.is_cuda() || scores.scalar_type() == ScalarType::Float
                           ? scores
                           : torch::stable::to(scores, ScalarType::Float);
  const auto ids = [](const OptionalTensor& t) {
    return t ? static_cast<const int64_t*>(t->const_data_ptr()) : nullptr;
  };
  const ChooseTokenArgs args = {
      .dtype = value_dtype(given, "scores"),
      .scores = given.const_data_ptr(),
      .drawn = ids(drawn),
      .rows = rows,
      .vocab_size = vocab_size,
      .row_stride = given.stride(0),
      .pad_id = ids(pad_id),
      .eos_ids = ids(eos_ids),
      .num_eos = eos_ids ? eos_ids->size(0) : 0,
      .advances = advances,
      .tokens = static_cast<int64_t*>(tokens.mutable_data_ptr()),
      .running = static_cast<bool*>(running.mutable_data_ptr()),
      .out = static_cast<int64_t*>(out.mutable_data_ptr()),
      .num_new = out.size(1),
      .step = static_cast<int64_t*>(step.mutable_data_ptr()),
      .report = static_cast<float*>(report.mutable_data_ptr()),
      .lengths = static_cast<int32_t*>(lengths.mutable_data_ptr()),
      .positions = static_cast<int64_t*>(positions.mutable_data_ptr()),
      .slots = static_cast<int32_t*>(slots.mutable_data_ptr()),
      .seen = static_cast<int32_t*>(seen.mutable_data_ptr()),
  };
  if (rows == 0) return;
  if (place.is_cuda()) return choose_on_cuda(args, given);
  choose_on_cpu(args);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(alula, CPU, m) { m.impl("choose_token", ALULA_BOX(choose_token)); }
STABLE_TORCH_LIBRARY_IMPL(alula, CUDA, m) { m.impl("choose_token", ALULA_BOX(choose_token)); }

}  // namespace alula
