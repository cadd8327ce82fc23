#include "cpu/peak.h"

#include "cpu/vec.h"

namespace alula::ALULA_ISA {
namespace {

// Independent sums: enough to hide the latency, few enough for the registers.
constexpr int kChains = sizeof(Vec) == 64 ? 24 : 12;

double fp32_fma(long iterations, float* sink) {
  Vec acc[kChains];
  for (int i = 0; i < kChains; i++) acc[i] = broadcast(static_cast<float>(i));
  Vec a = broadcast(0.999f), b = broadcast(0.001f);
  for (long n = 0; n < iterations; n++) {
#pragma GCC unroll 24
    for (int i = 0; i < kChains; i++) acc[i] = fma(acc[i], a, b);
  }
  Vec sum = zero();
  for (int i = 0; i < kChains; i++) sum = sum + acc[i];
  *sink = reduce_add(sum);
  return 2.0 * static_cast<double>(iterations) * kChains * Vec::kWidth;
}

#if defined(__AVX512BF16__)
double bf16_dot(long iterations, float* sink) {
  Vec acc[kChains];
  for (int i = 0; i < kChains; i++) acc[i] = broadcast(static_cast<float>(i));
  const auto a = (__m512bh)_mm512_set1_epi32(0x3c003c00), b = (__m512bh)_mm512_set1_epi32(0x3c013c01);
  for (long n = 0; n < iterations; n++) {
#pragma GCC unroll 24
    for (int i = 0; i < kChains; i++) acc[i].v = _mm512_dpbf16_ps(acc[i].v, a, b);
  }
  Vec sum = zero();
  for (int i = 0; i < kChains; i++) sum = sum + acc[i];
  *sink = reduce_add(sum);
  return 4.0 * static_cast<double>(iterations) * kChains * Vec::kWidth;
}
#else
double bf16_dot(long, float*) { return 0; }
#endif

#if defined(__AVX512VNNI__)
// Twelve sums hide the latency; with 24 GCC 12 copies and spills them, as the instruction overwrites its sum. Every
// loop over them is unrolled: an index known only at run time would keep them in memory.
double int8_dot(long iterations, float* sink) {
  constexpr int kIntChains = 12;
  __m512i acc[kIntChains];
#pragma GCC unroll 24
  for (int i = 0; i < kIntChains; i++) acc[i] = _mm512_set1_epi32(i);
  const __m512i a = _mm512_set1_epi32(0x01020304), b = _mm512_set1_epi32(0x7f01ff03);
  for (long n = 0; n < iterations; n++) {
#pragma GCC unroll 24
    for (int i = 0; i < kIntChains; i++) acc[i] = _mm512_dpbusd_epi32(acc[i], a, b);
  }
  __m512i sum = acc[0];
#pragma GCC unroll 24
  for (int i = 1; i < kIntChains; i++) sum = _mm512_xor_si512(sum, acc[i]);
  *sink = static_cast<float>(_mm512_reduce_add_epi32(sum));
  return 8.0 * static_cast<double>(iterations) * kIntChains * Vec::kWidth;
}
#else
double int8_dot(long, float*) { return 0; }
#endif

}  // namespace

const PeakKernels kPeak = {fp32_fma, bf16_dot, int8_dot};

}  // namespace alula::ALULA_ISA
