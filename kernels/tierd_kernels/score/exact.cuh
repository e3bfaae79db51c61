// Scores of original keys, in double.
constexpr float EXP_ERROR = 2.0e-7f;                           // ex2.approx.ftz: 2^-22.5, and rounding of the difference's last bit
constexpr float SCORE_ROUNDINGS = 8.f * U32F;                  // of a score and of score - top, in units of the largest score
constexpr float DOUBLE_ROUNDINGS = (2 * D + 8) * 1.1102231e-16f;  // of a score of originals, in units of |scale| sum |q_c k_c|
constexpr float BLOCK_ROOT = BLOCK == 16 ? 4.f : BLOCK == 32 ? 5.6568549f : 8.f;
constexpr float STORE = 1.f + 9.5367431640625e-7f;             // from above, over the FP32 arithmetic of Delta and D

// Query row `index` of KV head h: where its channels start in q and output, and how many tokens it sees.
struct Row { bool real; i64 at; int seen; };
__device__ __forceinline__ Row query_row(const Call &call, int h, int group, int index) {
  const int n = call.n, rows = group * n, token = index - quotient(index, n) * n;
  const bool real = index < rows;
  return {real, (i64)(h * rows + (real ? index : 0)) * D, real ? call.tokens - n + 1 + token : 0};
}

// q . k in double, and sum |q_c k_c|.
struct Product { double sum, size; };
template <typename Q>
__device__ __forceinline__ Product product(const float *k, Q q) {
  double sum[2] = {0., 0.}, size = 0.;
  for (int i = 0; i < D; i += 2) {
    const double x = wide(q(i)) * wide(k[i]), y = wide(q(i + 1)) * wide(k[i + 1]);
    sum[0] += x, sum[1] += y, size += fabs(x) + fabs(y);
  }
  return {sum[0] + sum[1], size};
}

// What bounds the error of scores of originals, the weight's included.
__device__ __forceinline__ float exact_epsilon(float largest, double size) {
  return (SCORE_ROUNDINGS * largest + EXP_ERROR + (float)(DOUBLE_ROUNDINGS * size)) * STORE;
}

// A record of originals to x [BLOCK][D + 1] in FP32: the first `count` tokens.
__device__ __forceinline__ void load_record(float *x, const unsigned char *record, int count, int threads) {
  constexpr int PER = 16 / ITEM;
#pragma unroll 4
  for (int i = threadIdx.x * PER; i < count * D; i += threads * PER) {
    const uint4 bits = *(const uint4 *)(record + (i64)i * ITEM);
#pragma unroll
    for (int k = 0; k < PER; k++) x[(i + k) / D * (D + 1) + (i + k) % D] = as_float(&bits, k);
  }
}

// Statistics of one row and block from its weights, lane by token; see `Sums`.
struct RowSums {
  float v[8];
  __device__ __forceinline__ RowSums() {
#pragma unroll
    for (int i = 0; i < 8; i++) v[i] = -0.f;  // to which adding is no instruction
  }
  __device__ __forceinline__ void add(float w, float nu, float eta) {
    float normed = w * nu, failed = w * eta;
    v[SUM] += w;
    v[SUM_SQUARES] = fmaf(w, w, v[SUM_SQUARES]);
    v[SUM_NORM] += normed;
    v[SUM_SQUARES_NORM] = fmaf(normed, normed, v[SUM_SQUARES_NORM]);
    v[SUM_ERROR] += failed;
    v[SUM_SQUARE_VALUE] = fmaf(normed, nu, v[SUM_SQUARE_VALUE]);
    v[SUM_SQUARE_ERROR] = fmaf(failed, eta, v[SUM_SQUARE_ERROR]);
  }
};
