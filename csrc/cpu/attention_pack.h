// What attention multiplies, and how a tile of keys and values is packed for it.
//
// Operands are arrays of 32-bit units: a float, or on AVX512_BF16 a pair of bf16 that one instruction multiplies (two d
// of a query and a key, two slots of a probability and a value). All other types become float when they are packed.
//   keys    [panels of 32 keys][units][32]              transposed by squares in registers
//   values  [panels of 32 columns][slots / kStep][32]   copied; for pairs, two slots interleaved
//   query   [units]
// No slot at or beyond the count of a key tile is read.
#pragma once

#include "cpu/tile.h"
#include "cpu/transpose.h"

namespace alula::ALULA_ISA {

constexpr int kKeysAtOnce = 128;  // the most keys of a key tile
static_assert(kKeysAtOnce % kPanel == 0, "a key tile is a whole number of panels");

// What a product of values of type W is made of.
template <typename W>
struct Units {
  static constexpr int kStep = 1;  // values in a unit
};
#if defined(__AVX512BF16__)
template <>
struct Units<bf16> {
  static constexpr int kStep = 2;
};
#endif

// The units of up to Vec::kWidth * kStep values.
template <typename W>
ALULA_INLINE Vec load_units(const W* p, int lanes) {
  if constexpr (Units<W>::kStep == 2) {
    return load(reinterpret_cast<const float*>(p), lanes);
  } else {
    return load(p, lanes);
  }
}
template <typename W>
ALULA_INLINE Vec load_units(const W* p) {
  if constexpr (Units<W>::kStep == 2) {
    return load(reinterpret_cast<const float*>(p));
  } else {
    return load(p);
  }
}

// a * b + c, where a and b are units.
template <typename W>
ALULA_INLINE Vec multiply_units(Vec a, Vec b, Vec c) {
#if defined(__AVX512BF16__)
  if constexpr (Units<W>::kStep == 2) return {_mm512_dpbf16_ps(c.v, (__m512bh)a.v, (__m512bh)b.v)};
#endif
  return fma(a, b, c);
}

// One key/value head of one row of the batch: slot j has its key at data + j * stride, its value at values + j *
// value_stride.
template <typename W>
struct KeyValues {
  const W* data;
  ptrdiff_t stride;
  int64_t head_dim;
  const W* values;
  ptrdiff_t value_stride;
};

// Of a merged cache: each value D behind its key.
template <typename W>
ALULA_INLINE KeyValues<W> merged(const W* data, ptrdiff_t stride, int64_t head_dim) {
  return {data, stride, head_dim, data + head_dim, stride};
}

struct KeyTile {
  int64_t first;  // slot
  int count;      // <= kKeysAtOnce
  float bias;     // added to every score
};

// A square of units: those from `unit` on of the keys from `key` on, transposed to out [units][32].
template <typename W, bool kWhole>
ALULA_INLINE void pack_key_square(const KeyValues<W>& source, int64_t slot, int keys, int64_t unit, int lanes,
                                  float* out) {
  Vec rows[Vec::kWidth];
#pragma GCC unroll 16
  for (int i = 0; i < Vec::kWidth; i++) {
    const W* p = source.data + (slot + i) * source.stride + unit * Units<W>::kStep;
    if constexpr (kWhole) {
      rows[i] = load_units(p);
    } else {
      rows[i] = i < keys ? load_units(p, lanes) : zero();
    }
  }
  transpose(rows);
#pragma GCC unroll 16
  for (int i = 0; i < Vec::kWidth; i++) {
    if (kWhole || i < lanes) store(out + i * kPanel, rows[i]);
  }
}

// Keys of `tile` to k: [panels of 32 keys][units][32]. What stands for keys beyond the count is not defined.
template <typename W>
void pack_keys(const KeyValues<W>& source, const KeyTile& tile, float* k) {
  const int64_t units = source.head_dim / Units<W>::kStep;
  for (int key = 0; key < tile.count; key += Vec::kWidth) {
    float* out = k + key / kPanel * units * kPanel + key % kPanel;
    const int keys = tile.count - key < Vec::kWidth ? tile.count - key : Vec::kWidth;
    for (int64_t unit = 0; unit < units; unit += Vec::kWidth) {
      const int lanes = static_cast<int>(units - unit < Vec::kWidth ? units - unit : Vec::kWidth);
      if (keys == Vec::kWidth && lanes == Vec::kWidth) {
        pack_key_square<W, true>(source, tile.first + key, keys, unit, lanes, out + unit * kPanel);
      } else {
        pack_key_square<W, false>(source, tile.first + key, keys, unit, lanes, out + unit * kPanel);
      }
    }
  }
}

constexpr int64_t kValuePanelSize = kKeysAtOnce * kPanel;  // units of a panel of values, for both kinds of unit

// Up to Vec::kWidth columns of the values at `value` and, where they are paired, `stride` further: zero where has_odd
// is not.
template <bool kWhole, typename W>
ALULA_INLINE Vec load_value_units(const W* value, [[maybe_unused]] ptrdiff_t stride, [[maybe_unused]] bool has_odd,
                                  int lanes) {
#if defined(__AVX512BF16__)
  if constexpr (Units<W>::kStep == 2) {
    const __mmask16 mask = kWhole ? 0xffff : first_lanes(lanes);
    const __m512i even = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, value));
    const __mmask16 odd_mask = has_odd ? mask : 0;
    const __m512i odd = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(odd_mask, value + (has_odd ? stride : 0)));
    return {_mm512_castsi512_ps(_mm512_or_si512(even, _mm512_slli_epi32(odd, 16)))};
  }
#endif
  return kWhole ? load(value) : load(value, lanes);
}

// Values of `tile` to v: [panels of 32 columns, panel_size units apart][keys / kStep][32]. The odd key's partner in a
// pair is zero.
template <typename W>
void pack_values(const KeyValues<W>& source, const KeyTile& tile, float* v, int64_t panel_size = kValuePanelSize) {
  const int64_t d = source.head_dim, stride = source.value_stride;
  const W* values = source.values + tile.first * stride;
  for (int key = 0; key < tile.count; key += Units<W>::kStep) {
    const W* value = values + key * stride;
    const bool has_odd = key + 1 < tile.count;
    float* out = v + key / Units<W>::kStep * kPanel;
    for (int64_t column = 0; column < d; column += Vec::kWidth) {
      float* to = out + column / kPanel * panel_size + column % kPanel;
      if (d - column >= Vec::kWidth) {
        store(to, load_value_units<true>(value + column, stride, has_odd, Vec::kWidth));
      } else {
        store(to, load_value_units<false>(value + column, stride, has_odd, static_cast<int>(d - column)));
      }
    }
  }
}

// The units of a query row.
template <typename W>
void pack_query_row(const W* q, int64_t head_dim, float* out) {
  const int64_t units = head_dim / Units<W>::kStep;
  for (int64_t unit = 0; unit < units; unit += Vec::kWidth) {
    const int lanes = static_cast<int>(units - unit < Vec::kWidth ? units - unit : Vec::kWidth);
    store(out + unit, load_units(q + unit * Units<W>::kStep, lanes));
  }
}

}  // namespace alula::ALULA_ISA
