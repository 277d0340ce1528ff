/* Chosen rows of a half-precision array, standardised by channel, in one pass; see feature_cache.py. */

#include "native.h"

typedef union {
    uint32_t bits;
    float value;
} word;

/* A half-precision number, exactly; in a form that every compiler vectorises. */
static inline float widened(uint16_t half) {
    uint32_t magnitude = half & 0x7fff;
    word w = {magnitude << 13};
    w.value *= 0x1p112f; /* the difference of the exponents' biases */
    if (magnitude >= 0x7c00) w.bits |= 0x7f800000; /* infinity or NaN */
    w.bits |= (uint32_t)(half & 0x8000) << 16;
    return w.value;
}

/* out[b, c, l] = (array[index[b], c, l] - mean[c]) / std[c]; rows are (channels, length). */
void gather(int64_t count, int64_t channels, int64_t length, const uint16_t *array, const int64_t *index,
            const float *mean, const float *std, float *out, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t b = 0; b < count; b++) {
        const uint16_t *row = array + index[b] * channels * length;
        float *to = out + b * channels * length;
        for (int64_t c = 0; c < channels; c++) {
            const float m = mean[c], s = std[c];
#pragma omp simd
            for (int64_t l = 0; l < length; l++) to[c * length + l] = (widened(row[c * length + l]) - m) / s;
        }
    }
}
