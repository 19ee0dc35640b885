/* A gated FFN's matrix-vector products over chosen neurons, read where they lie: rows stream at copy bandwidth.
 *
 * Weights are [I, d], one row per neuron; sums are kept in float32. Every output is added up by one thread in a fixed
 * order, so results do not depend on the number of threads. While a row is computed with, the next one is prefetched,
 * since hardware prefetchers stop at every page and chosen rows lie apart; into the second-level cache, which measured
 * faster than into the first.
 */
#include <stdint.h>
#include <string.h>

#define LANES 16
#define STEP(TYPE) (64 / (int)sizeof(TYPE)) /* entries of a cache line */
#define FETCH(ADDRESS) __builtin_prefetch(ADDRESS, 0, 2)
#define DOWN_ROWS 4
typedef float vector __attribute__((vector_size(4 * LANES)));
typedef uint32_t words __attribute__((vector_size(4 * LANES)));
typedef uint16_t halves __attribute__((vector_size(2 * LANES)));

static inline vector load_float32(const float *from) {
  vector value;
  memcpy(&value, from, sizeof value);
  return value;
}

static inline vector load_bfloat16(const uint16_t *from) {
  halves half;
  memcpy(&half, from, sizeof half);
  words wide = __builtin_convertvector(half, words) << 16;
  vector value;
  memcpy(&value, &wide, sizeof value);
  return value;
}

static inline float sum(vector value) {
  float total = 0;
  for (int lane = 0; lane < LANES; lane++) total += value[lane];
  return total;
}

/* gated, raised [tokens, k] = x [tokens, d] times the chosen rows; d is a multiple of STEP. */
#define DOTS(NAME, TYPE, LOAD)                                                                                       \
  void NAME(const TYPE *gate, const TYPE *up, const int64_t *index, int64_t k, int64_t d, const float *x,            \
            int64_t tokens, float *gated, float *raised, int threads) {                                              \
    _Pragma("omp parallel for schedule(static) num_threads(threads)") for (int64_t i = 0; i < k; i++) {              \
      const TYPE *g = gate + index[i] * d, *u = up + index[i] * d;                                                   \
      int64_t next = index[i + 1 < k ? i + 1 : i] * d;                                                               \
      for (int64_t token = 0; token < tokens; token++) {                                                             \
        const float *in = x + token * d;                                                                             \
        vector a = {0}, b = {0};                                                                                     \
        for (int64_t j = 0; j < d; j += STEP(TYPE)) {                                                                \
          if (token == 0) {                                                                                          \
            FETCH(gate + next + j);                                                                                  \
            FETCH(up + next + j);                                                                                    \
          }                                                                                                          \
          for (int64_t part = j; part < j + STEP(TYPE); part += LANES) {                                             \
            vector value = load_float32(in + part);                                                                  \
            a += LOAD(g + part) * value;                                                                             \
            b += LOAD(u + part) * value;                                                                             \
          }                                                                                                          \
        }                                                                                                            \
        gated[token * k + i] = sum(a);                                                                               \
        raised[token * k + i] = sum(b);                                                                              \
      }                                                                                                              \
    }                                                                                                                \
  }

/* out [tokens, d] = activations [tokens, k] times the chosen down rows; a thread has its columns of all rows. */
#define ADD_UP(NAME, TYPE, LOAD)                                                                                     \
  void NAME(const TYPE *down, const int64_t *index, int64_t k, int64_t d, const float *activations, int64_t tokens,  \
            float *out, int threads) {                                                                               \
    int64_t lines = d / STEP(TYPE);                                                                                  \
    _Pragma("omp parallel for schedule(static) num_threads(threads)") for (int part = 0; part < threads; part++) {   \
      int64_t begin = lines * part / threads * STEP(TYPE), end = lines * (part + 1) / threads * STEP(TYPE);          \
      for (int64_t token = 0; token < tokens; token++) memset(out + token * d + begin, 0, 4 * (end - begin));        \
      for (int64_t i = 0; i < k; i += DOWN_ROWS) {                                                                   \
        const TYPE *row[DOWN_ROWS], *next[DOWN_ROWS];                                                                \
        for (int r = 0; r < DOWN_ROWS; r++) {                                                                        \
          row[r] = down + index[i + r < k ? i + r : k - 1] * d;                                                      \
          next[r] = down + index[i + DOWN_ROWS + r < k ? i + DOWN_ROWS + r : k - 1] * d;                             \
        }                                                                                                            \
        for (int64_t token = 0; token < tokens; token++) {                                                           \
          float *sums = out + token * d, weight[DOWN_ROWS];                                                          \
          for (int r = 0; r < DOWN_ROWS; r++) weight[r] = i + r < k ? activations[token * k + i + r] : 0;            \
          for (int64_t j = begin; j < end; j += LANES) {                                                             \
            vector total = load_float32(sums + j);                                                                   \
            for (int r = 0; r < DOWN_ROWS; r++) {                                                                    \
              if (token == 0 && j % STEP(TYPE) == 0) FETCH(next[r] + j);                                             \
              total += LOAD(row[r] + j) * weight[r];                                                                 \
            }                                                                                                        \
            memcpy(sums + j, &total, sizeof total);                                                                  \
          }                                                                                                          \
        }                                                                                                            \
      }                                                                                                              \
    }                                                                                                                \
  }

DOTS(dots_float32, float, load_float32)
DOTS(dots_bfloat16, uint16_t, load_bfloat16)
ADD_UP(add_up_float32, float, load_float32)
ADD_UP(add_up_bfloat16, uint16_t, load_bfloat16)
