/* What a fusion cell does beside matrix products, in one pass over the tensors each way; see fused.py.

   Tensors are (rows, channels), row by row: a row is a position of a sample. Threads take consecutive rows.
   Sums over rows are made in `real` within a block and in double between blocks and threads. NaN stays NaN. */

#include <math.h>
#include "native.h"

enum { BLOCK = 64 /* rows */, CHUNK = 1024 /* entries */ };

/* Which entries are dropped is a function of their place and of two random numbers. */
typedef struct {
    uint32_t key, salt;
    uint32_t dropped; /* an entry whose 32 bits are below this is dropped */
    double scale;     /* factor of the others */
} draw;

/* 32 bits to 32 bits, every bit of the result depending on every bit of x (a murmur finaliser). */
static inline uint32_t scrambled(uint32_t x) {
    x ^= x >> 16;
    x *= 0x7feb352du;
    x ^= x >> 15;
    x *= 0x846ca68bu;
    return x ^ (x >> 16);
}

static inline uint32_t row_key(int64_t row, const draw *d) {
    uint32_t high = (uint32_t)((uint64_t)row >> 32);
    return scrambled(scrambled((uint32_t)row ^ d->key) + d->salt + high);
}

static inline int is_dropped(uint32_t row, int64_t column, const draw *d) {
    return scrambled(row + (uint32_t)column * 0x9e3779b9u) < d->dropped;
}

/* e^x; in single precision as 2^n e^r with |r| < 0.35, in a form that compilers vectorise. */
static inline real exponential(real x) {
    if (sizeof(real) == sizeof(double)) return exp(x);
    float clamped = x < -87 ? -87 : x > 88 ? 88 : x, n = rintf(clamped * 1.44269504f);
    float r = clamped - n * 0.693359375f + n * 2.12194440e-4f;
    float series = 1.f / 5040;
    series = series * r + 1.f / 720;
    series = series * r + 1.f / 120;
    series = series * r + 1.f / 24;
    series = series * r + 1.f / 6;
    series = series * r + .5f;
    series = series * r + 1;
    series = series * r + 1;
    union { int32_t bits; float power; } two = {((int32_t)n + 127) << 23};
    return series * two.power;
}

/* Sums of all threads, (threads, 2, channels), into the first one's. */
static void gather(double *sums, int64_t channels, int threads) {
    for (int t = 1; t < threads; t++)
        for (int64_t c = 0; c < 2 * channels; c++) sums[c] += sums[t * 2 * channels + c];
}

/* Adds to `sums` those over this thread's rows of x - x[0] and of its square. */
static void add_moments(int64_t rows, int64_t channels, const real *x, double *sums, real *part) {
    int64_t stop = last_row(rows);
    for (int64_t begin = first_row(rows); begin < stop; begin += BLOCK) {
        memset(part, 0, 2 * channels * sizeof(real));
        for (int64_t r = begin; r < begin + BLOCK && r < stop; r++) {
            const real *xr = x + r * channels;
#pragma omp simd
            for (int64_t c = 0; c < channels; c++) {
                real v = xr[c] - x[c];
                part[c] += v;
                part[channels + c] += v * v;
            }
        }
        for (int64_t c = 0; c < 2 * channels; c++) sums[c] += part[c];
    }
}

/* Batch statistics from the sums, and what they and the affine map make of a column: slope x + shift. */
static void make_affine(int64_t rows, int64_t channels, const real *x, const double *sums, const real *weight,
                        const real *bias, double eps, real *mean, real *var, real *rstd, real *slope,
                        real *shift) {
    for (int64_t c = 0; c < channels; c++) {
        double first = sums[c] / rows, variance = sums[channels + c] / rows - first * first;
        if (variance < 0) variance = 0;
        mean[c] = x[c] + first;
        var[c] = variance;
        rstd[c] = 1 / sqrt(variance + eps);
        slope[c] = weight[c] * rstd[c];
        shift[c] = bias[c] - mean[c] * slope[c];
    }
}

/* Gradients of weight and bias into `affine` (2, channels), and the map from (gradient before the activation,
   x - mean, 1) to x's gradient into `map` (3, channels). */
static void make_map(int64_t rows, int64_t channels, const double *sums, const real *rstd, const real *slope,
                     real *affine, real *map) {
    for (int64_t c = 0; c < channels; c++) {
        double first = sums[c], second = sums[channels + c];
        affine[c] = second * rstd[c];
        affine[channels + c] = first;
        map[c] = slope[c];
        map[channels + c] = -slope[c] * rstd[c] * rstd[c] * second / rows;
        map[2 * channels + c] = -slope[c] * first / rows;
    }
}

/* BatchNorm with batch statistics, ReLU or gated linear unit, dropout.

   x (rows, channels), out (rows, channels) or, gated, (rows, channels / 2); `gate` of out's shape is left with
   the gates, 0 where dropped. `statistics` (5, channels) are left as mean, variance, 1 / standard deviation,
   slope and shift. Returns 0, or 1 without memory. */
int forward(int64_t rows, int64_t channels, int gated, const real *x, const real *weight, const real *bias,
            double eps, const draw *d, real *statistics, real *gate, real *out, int threads) {
    real *mean = statistics, *var = mean + channels, *rstd = var + channels, *slope = rstd + channels,
         *shift = slope + channels;
    double *sums = calloc((size_t)threads * 2 * channels, sizeof(double));
    real *parts = malloc((size_t)threads * 2 * channels * sizeof(real));
    const real scale = d->scale;
    if (!sums || !parts) {
        free(sums);
        free(parts);
        return 1;
    }
#pragma omp parallel num_threads(threads)
    {
        int64_t offset = omp_get_thread_num() * 2 * channels, stop = last_row(rows);
        add_moments(rows, channels, x, sums + offset, parts + offset);
#pragma omp barrier
#pragma omp master
        {
            gather(sums, channels, omp_get_num_threads());
            make_affine(rows, channels, x, sums, weight, bias, eps, mean, var, rstd, slope, shift);
        }
#pragma omp barrier
        for (int64_t r = first_row(rows); r < stop; r++) {
            uint32_t row = row_key(r, d);
            const real *xr = x + r * channels;
            if (gated) {
                int64_t half = channels / 2;
                real *q = gate + r * half, *o = out + r * half;
#pragma omp simd
                for (int64_t c = 0; c < half; c++)
                    q[c] = 1 / (1 + exponential(-(xr[half + c] * slope[half + c] + shift[half + c])));
#pragma omp simd
                for (int64_t c = 0; c < half; c++) q[c] = is_dropped(row, c, d) ? 0 : q[c];
#pragma omp simd
                for (int64_t c = 0; c < half; c++) o[c] = (xr[c] * slope[c] + shift[c]) * q[c] * scale;
            } else {
                real *o = out + r * channels;
#pragma omp simd
                for (int64_t c = 0; c < channels; c++) {
                    real z = xr[c] * slope[c] + shift[c];
                    o[c] = is_dropped(row, c, d) | (z <= 0) ? 0 : z * scale;
                }
            }
        }
    }
    free(sums);
    free(parts);
    return 0;
}

/* Gradients of `forward`, given g of out's shape and `kept`: the gates, or without gates the result.
   `gx` (rows, channels) and `affine` (2, channels), of weight and bias, are written. */
int backward(int64_t rows, int64_t channels, int gated, const real *x, const real *kept, const real *g,
             const real *statistics, double scaled, real *gx, real *affine, int threads) {
    const real *mean = statistics, *rstd = mean + 2 * channels, *slope = rstd + channels, *shift = slope + channels;
    double *sums = calloc((size_t)threads * 2 * channels, sizeof(double));
    real *parts = malloc((size_t)(threads * 2 + 3) * channels * sizeof(real));
    const real scale = scaled;
    if (!sums || !parts) {
        free(sums);
        free(parts);
        return 1;
    }
    real *map = parts + threads * 2 * channels;
#pragma omp parallel num_threads(threads)
    {
        int64_t offset = omp_get_thread_num() * 2 * channels, stop = last_row(rows);
        real *part = parts + offset;
        for (int64_t begin = first_row(rows); begin < stop; begin += BLOCK) {
            memset(part, 0, 2 * channels * sizeof(real));
            for (int64_t r = begin; r < begin + BLOCK && r < stop; r++) {
                const real *xr = x + r * channels;
                real *gz = gx + r * channels;
                if (gated) {
                    int64_t half = channels / 2;
                    const real *q = kept + r * half, *gr = g + r * half;
#pragma omp simd
                    for (int64_t c = 0; c < half; c++) {
                        real v = gr[c] * scale * q[c];
                        gz[c] = v;
                        gz[half + c] = v * (xr[c] * slope[c] + shift[c]) * (1 - q[c]);
                    }
                } else {
                    const real *o = kept + r * channels, *gr = g + r * channels;
#pragma omp simd
                    for (int64_t c = 0; c < channels; c++) gz[c] = o[c] != 0 ? gr[c] * scale : 0;
                }
#pragma omp simd
                for (int64_t c = 0; c < channels; c++) {
                    part[c] += gz[c];
                    part[channels + c] += gz[c] * (xr[c] - mean[c]);
                }
            }
            for (int64_t c = 0; c < 2 * channels; c++) sums[offset + c] += part[c];
        }
#pragma omp barrier
#pragma omp master
        {
            gather(sums, channels, omp_get_num_threads());
            make_map(rows, channels, sums, rstd, slope, affine, map);
        }
#pragma omp barrier
        for (int64_t r = first_row(rows); r < stop; r++) {
            const real *xr = x + r * channels;
            real *gz = gx + r * channels;
#pragma omp simd
            for (int64_t c = 0; c < channels; c++)
                gz[c] = map[c] * gz[c] + map[channels + c] * (xr[c] - mean[c]) + map[2 * channels + c];
        }
    }
    free(sums);
    free(parts);
    return 0;
}

/* x with dropped entries zero and the others scaled. */
void drop(int64_t rows, int64_t channels, const real *x, const draw *d, real *out, int threads) {
    const real scale = d->scale;
#pragma omp parallel num_threads(threads)
    for (int64_t r = first_row(rows), stop = last_row(rows); r < stop; r++) {
        uint32_t row = row_key(r, d);
        const real *xr = x + r * channels;
        real *o = out + r * channels;
#pragma omp simd
        for (int64_t c = 0; c < channels; c++) o[c] = is_dropped(row, c, d) ? 0 : xr[c] * scale;
    }
}

/* out = sum of weights[k] x[k], of `size` entries each. */
void total(int64_t size, int count, const real *const *x, const real *weights, real *out, int threads) {
#pragma omp parallel num_threads(threads)
    for (int64_t begin = first_row(size), last = last_row(size); begin < last; begin += CHUNK) {
        int64_t stop = begin + CHUNK < last ? begin + CHUNK : last;
        for (int k = 0; k < count; k++) {
            const real *xk = x[k], w = weights[k];
#pragma omp simd
            for (int64_t i = begin; i < stop; i++) out[i] = (k ? out[i] : 0) + w * xk[i];
        }
    }
}

/* Gradients of `total`, given g: gx[k], where it is not null, and weights' into `dots` (threads, count). */
void total_gradient(int64_t size, int count, const real *const *x, const real *weights, const real *g,
                    real *const *gx, double *dots, int threads) {
#pragma omp parallel num_threads(threads)
    for (int64_t begin = first_row(size), last = last_row(size); begin < last; begin += CHUNK) {
        int64_t stop = begin + CHUNK < last ? begin + CHUNK : last;
        for (int k = 0; k < count; k++) {
            const real *xk = x[k], w = weights[k];
            real dot = 0;
#pragma omp simd reduction(+ : dot)
            for (int64_t i = begin; i < stop; i++) dot += g[i] * xk[i];
            dots[omp_get_thread_num() * count + k] += dot;
            if (!gx[k]) continue;
            real *gk = gx[k];
#pragma omp simd
            for (int64_t i = begin; i < stop; i++) gk[i] = w * g[i];
        }
    }
}

/* ReLU of (samples, length, channels) to (samples, channels, length). */
void relu_transposed(int64_t samples, int64_t length, int64_t channels, const real *x, real *out, int threads) {
#pragma omp parallel num_threads(threads)
    for (int64_t b = first_row(samples), stop = last_row(samples); b < stop; b++) {
        const real *xb = x + b * length * channels;
        real *ob = out + b * length * channels;
        for (int64_t c = 0; c < channels; c++)
#pragma omp simd
            for (int64_t l = 0; l < length; l++) {
                real v = xb[l * channels + c];
                ob[c * length + l] = v <= 0 ? 0 : v;
            }
    }
}

/* Gradient of `relu_transposed`, given its result and g of that shape. */
void relu_transposed_gradient(int64_t samples, int64_t length, int64_t channels, const real *out,
                              const real *g, real *gx, int threads) {
#pragma omp parallel num_threads(threads)
    for (int64_t b = first_row(samples), stop = last_row(samples); b < stop; b++) {
        int64_t start = b * length * channels;
        for (int64_t c = 0; c < channels; c++)
            for (int64_t l = 0; l < length; l++) {
                int64_t from = start + c * length + l;
                gx[start + l * channels + c] = out[from] != 0 ? g[from] : 0;
            }
    }
}
