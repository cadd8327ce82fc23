// Sums of a panel become rows of a result: bias, activation, residual. What linear does with every column and
// qkv_projection with those of the MLP.
#pragma once

#include "cpu/activation.h"
#include "cpu/tile.h"

namespace alula::ALULA_ISA {

// `columns` (at most kPanel) columns of `rows` rows; every pointer is at the first of them.
template <typename W>
struct ActivatedRows {
  int64_t rows, columns;
  const float* sums;  // [rows][kPanel]
  const W* bias;      // may be null
  int activation;
  const W* residual;  // added last; may be null
  W* out;
  int64_t stride;  // from a row of out, and of residual, to the next
};

// The values of a row, in registers' worth, with the bias added: f(column, lanes, value).
template <typename W, typename F>
ALULA_INLINE void for_each_column(const W* bias, int64_t columns, const float* sums, F f) {
  for (int64_t column = 0; column < columns; column += Vec::kWidth) {
    const int lanes = static_cast<int>(columns - column < Vec::kWidth ? columns - column : Vec::kWidth);
    const bool is_whole = lanes == Vec::kWidth;
    Vec value = is_whole ? load(sums + column) : load(sums + column, lanes);
    if (bias) value = value + (is_whole ? load(bias + column) : load(bias + column, lanes));
    f(column, lanes, value);
  }
}

template <typename W>
ALULA_INLINE void write_values(W* out, const W* residual, int lanes, Vec value) {
  if (lanes == Vec::kWidth) {
    if (residual) value = value + load(residual);
    store(out, value);
  } else {
    if (residual) value = value + load(residual, lanes);
    store(out, value, lanes);
  }
}

template <typename W, Activation kActivation>
void write_activated(const ActivatedRows<W>& to) {
  for (int64_t i = 0; i < to.rows; i++) {
    W* out = to.out + i * to.stride;
    const W* residual = to.residual ? to.residual + i * to.stride : nullptr;
    for_each_column(to.bias, to.columns, to.sums + i * kPanel, [&](int64_t column, int lanes, Vec value) {
      write_values(out + column, residual ? residual + column : nullptr, lanes, activate<kActivation>(value));
    });
  }
}

// The same for any activation, through memory: its arithmetic is compiled once (activation_cpu.cpp), not for each
// dtype.
template <typename W>
void write_activated_by_any(const ActivatedRows<W>& to) {
  alignas(64) float values[kPanel];
  for (int64_t i = 0; i < to.rows; i++) {
    for_each_column(to.bias, to.columns, to.sums + i * kPanel,
                    [&](int64_t column, int, Vec value) { store(values + column, value); });
    activate(to.activation, values, to.columns);
    W* out = to.out + i * to.stride;
    const W* residual = to.residual ? to.residual + i * to.stride : nullptr;
    for_each_column<W>(nullptr, to.columns, values, [&](int64_t column, int lanes, Vec value) {
      write_values(out + column, residual ? residual + column : nullptr, lanes, value);
    });
  }
}

// The writer for an activation. The first ones of the table, which models use, have one each: from sums to the result
// in registers.
template <typename W>
ALULA_INLINE auto activated_writer(int activation) {
  constexpr int kNumFused = static_cast<int>(Activation::kTanh) + 1;
  using Writer = void (*)(const ActivatedRows<W>&);
  static constexpr Writer kFused[kNumFused] = {
      write_activated<W, Activation::kNone>, write_activated<W, Activation::kGeluTanh>,
      write_activated<W, Activation::kGelu>, write_activated<W, Activation::kRelu>,
      write_activated<W, Activation::kSilu>, write_activated<W, Activation::kTanh>,
  };
  return activation < kNumFused ? kFused[activation] : Writer(write_activated_by_any<W>);
}

}  // namespace alula::ALULA_ISA
