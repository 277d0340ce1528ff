/* A grouped 1x1 convolution with the BatchNorm and the ReLU behind it; see pointwise.py, which compiles this.

   Tensors are (rows, groups, channels), a row for each position of each sample. What the convolution gives is
   written once and read once more forward; backward its gradient is never written. Threads take consecutive
   rows. CHANNELS is given, so that the sums stay in registers. */

#include <math.h>
#include "native.h"

#ifdef __AVX512F__
#define BYTES (CHANNELS * sizeof(real) % 64 ? 32 : 64) /* of a vector register; channels fill whole ones */
#else
#define BYTES 32
#endif
#define LANES ((int)(BYTES / sizeof(real)))
#define VECTORS (CHANNELS / LANES) /* of a group */
typedef real vector __attribute__((vector_size(LANES * sizeof(real)), aligned(sizeof(real)), may_alias));
typedef __typeof__((vector){0} == (vector){0}) mask;
enum {
    TOGETHER = VECTORS > 1 ? 4 : 8, /* rows that share a weight in a register */
    CHUNK = 64                      /* rows of a group at a time */
};

/* z, or 0 where the mask is set. */
static inline vector unless(vector z, mask zero) { return (vector)((mask)z & ~zero); }

/* out[r] = sum over k of x[r][k] weight[k], for `count` <= TOGETHER rows of one group. */
static inline void product(const real *x, const real *weight, real *out, int64_t stride, int64_t out_stride,
                           int count) {
    vector sums[TOGETHER][VECTORS];
    memset(sums, 0, sizeof sums);
    for (int k = 0; k < CHANNELS; k++) {
        const vector *row = (const vector *)(weight + k * CHANNELS);
        for (int r = 0; r < TOGETHER; r++) {
            const real factor = x[(r < count ? r : 0) * stride + k];
            for (int v = 0; v < VECTORS; v++) sums[r][v] += factor * row[v];
        }
    }
    for (int r = 0; r < count; r++) memcpy(out + r * out_stride, sums[r], sizeof sums[r]);
}

/* Adds what the threads summed, (threads, count), into `total`. */
static void gather(const double *sums, int64_t count, int threads, double *total) {
    memset(total, 0, count * sizeof(double));
    for (int t = 0; t < threads; t++)
        for (int64_t i = 0; i < count; i++) total[i] += sums[t * count + i];
}

/* x (rows, groups, channels), weight (groups, out, in); y of x's shape is left with the convolution and out
   with relu(scale * norm(y)) or scale * norm(y), or with `add` it is added to out; `scale` (groups, channels)
   may be null. `statistics` (5,
   groups, channels) are left as mean, variance, 1 / standard deviation, and slope and shift of the affine map
   of y that out is. Returns 0, or 1 without memory. */
int forward(int64_t rows, int64_t groups, const real *x, const real *weight, const real *scale, int relu, int add,
            double eps, real *y, real *statistics, real *out, int threads) {
    const int64_t all = groups * CHANNELS;
    real *mean = statistics, *var = mean + all, *rstd = var + all, *slope = rstd + all, *shift = slope + all;
    double *sums = calloc((threads + 1) * 2 * all, sizeof(double));
    real *turned = malloc(groups * CHANNELS * CHANNELS * sizeof(real)); /* (groups, in, out) */
    real *parts = malloc(threads * 2 * all * sizeof(real));
    if (!sums || !turned || !parts) {
        free(sums);
        free(turned);
        free(parts);
        return 1;
    }
    for (int64_t g = 0; g < groups; g++)
        for (int o = 0; o < CHANNELS; o++)
            for (int k = 0; k < CHANNELS; k++)
                turned[(g * CHANNELS + k) * CHANNELS + o] = weight[(g * CHANNELS + o) * CHANNELS + k];
    for (int64_t g = 0; g < groups; g++) /* the first row, from which the moments are taken */
        product(x + g * CHANNELS, turned + g * CHANNELS * CHANNELS, mean + g * CHANNELS, 0, 0, 1);
#pragma omp parallel num_threads(threads)
    {
        const int64_t stop = last_row(rows);
        double *own = sums + omp_get_thread_num() * 2 * all;
        real *part = parts + omp_get_thread_num() * 2 * all;
        for (int64_t begin = first_row(rows); begin < stop; begin += CHUNK) {
            const int64_t end = begin + CHUNK < stop ? begin + CHUNK : stop;
            for (int64_t g = 0; g < groups; g++) {
                const real *w = turned + g * CHANNELS * CHANNELS;
                const vector *start = (const vector *)(mean + g * CHANNELS);
                vector first[VECTORS], second[VECTORS];
                memset(first, 0, sizeof first);
                memset(second, 0, sizeof second);
                for (int64_t r = begin; r < end; r += TOGETHER) {
                    const int count = end - r < TOGETHER ? end - r : TOGETHER;
                    real *to = y + r * all + g * CHANNELS;
                    product(x + r * all + g * CHANNELS, w, to, all, all, count);
                    for (int i = 0; i < count; i++)
                        for (int v = 0; v < VECTORS; v++) {
                            const vector away = *(const vector *)(to + i * all + v * LANES) - start[v];
                            first[v] += away;
                            second[v] += away * away;
                        }
                }
                memcpy(part + g * CHANNELS, first, sizeof first);
                memcpy(part + all + g * CHANNELS, second, sizeof second);
            }
            for (int64_t c = 0; c < 2 * all; c++) own[c] += part[c];
        }
#pragma omp barrier
#pragma omp master
        {
            double *total = sums + threads * 2 * all;
            gather(sums, 2 * all, omp_get_num_threads(), total);
            for (int64_t c = 0; c < all; c++) {
                double away = total[c] / rows, variance = total[all + c] / rows - away * away;
                if (variance < 0) variance = 0;
                mean[c] += away;
                var[c] = variance;
                rstd[c] = 1 / sqrt(variance + eps);
                slope[c] = (scale ? scale[c] : 1) * rstd[c];
                shift[c] = -mean[c] * slope[c];
            }
        }
#pragma omp barrier
        for (int64_t r = first_row(rows); r < stop; r++)
            for (int64_t c = 0; c < all; c += LANES) {
                const vector z = *(const vector *)(y + r * all + c) * *(const vector *)(slope + c) +
                                 *(const vector *)(shift + c);
                vector *to = (vector *)(out + r * all + c);
                vector result = z;
                if (relu) result = unless(z, z <= 0);
                if (add) result += *to;
                *to = result;
            }
    }
    free(sums);
    free(turned);
    free(parts);
    return 0;
}

/* Gradients of `forward`, given y and g of out's shape. `gx` of x's shape, `dw` of weight's shape and `ds`
   (groups, channels), of scale, are written; gx may be null, and with dw x too. */
int backward(int64_t rows, int64_t groups, const real *x, const real *weight, const real *y, const real *g,
             const real *statistics, int relu, real *gx, real *dw, real *ds, int threads) {
    const int64_t all = groups * CHANNELS, square = CHANNELS * CHANNELS;
    const real *mean = statistics, *rstd = mean + 2 * all, *slope = rstd + all, *shift = slope + all;
    double *sums = calloc((threads + 1) * 2 * all, sizeof(double));
    real *parts = malloc((threads * 2 + 2) * all * sizeof(real));
    real *products = calloc(dw ? threads * groups * square : 1, sizeof(real));
    if (!sums || !parts || !products) {
        free(sums);
        free(parts);
        free(products);
        return 1;
    }
    real *of_y = parts + threads * 2 * all, *of_one = of_y + all; /* y's gradient: slope gz + of_y away + of_one */
#pragma omp parallel num_threads(threads)
    {
        const int64_t stop = last_row(rows);
        double *own = sums + omp_get_thread_num() * 2 * all;
        real *part = parts + omp_get_thread_num() * 2 * all;
        for (int64_t begin = first_row(rows); begin < stop; begin += CHUNK) {
            const int64_t end = begin + CHUNK < stop ? begin + CHUNK : stop;
            for (int64_t c = 0; c < all; c += LANES) {
                const vector m = *(const vector *)(mean + c), sl = *(const vector *)(slope + c),
                             sh = *(const vector *)(shift + c);
                vector first, second;
                memset(&first, 0, sizeof first);
                memset(&second, 0, sizeof second);
                for (int64_t r = begin; r < end; r++) {
                    vector gz = *(const vector *)(g + r * all + c);
                    const vector value = *(const vector *)(y + r * all + c);
                    if (relu) gz = unless(gz, value * sl + sh <= 0);
                    first += gz;
                    second += gz * (value - m);
                }
                memcpy(part + c, &first, sizeof first);
                memcpy(part + all + c, &second, sizeof second);
            }
            for (int64_t c = 0; c < 2 * all; c++) own[c] += part[c];
        }
#pragma omp barrier
#pragma omp master
        {
            double *total = sums + threads * 2 * all;
            gather(sums, 2 * all, omp_get_num_threads(), total);
            for (int64_t c = 0; c < all; c++) {
                ds[c] = total[all + c] * rstd[c];
                of_y[c] = -slope[c] * rstd[c] * rstd[c] * total[all + c] / rows;
                of_one[c] = -slope[c] * total[c] / rows;
            }
        }
#pragma omp barrier
        real gy[TOGETHER * CHANNELS];
        for (int64_t begin = first_row(rows); begin < stop; begin += CHUNK) {
            const int64_t end = begin + CHUNK < stop ? begin + CHUNK : stop;
            for (int64_t group = 0; group < groups; group++) {
                const int64_t c = group * CHANNELS;
                real *d = products + (omp_get_thread_num() * groups + group) * square;
                for (int64_t r = begin; r < end; r += TOGETHER) {
                    const int count = end - r < TOGETHER ? end - r : TOGETHER;
                    for (int i = 0; i < TOGETHER; i++)
                        for (int v = 0; v < VECTORS; v++) {
                            const int64_t column = c + v * LANES, at = (r + (i < count ? i : 0)) * all + column;
                            const vector value = *(const vector *)(y + at), sl = *(const vector *)(slope + column);
                            vector gz = *(const vector *)(g + at);
                            if (relu) gz = unless(gz, value * sl + *(const vector *)(shift + column) <= 0);
                            gz = sl * gz + *(const vector *)(of_one + column) +
                                 *(const vector *)(of_y + column) * (value - *(const vector *)(mean + column));
                            if (i >= count) memset(&gz, 0, sizeof gz);
                            memcpy(gy + i * CHANNELS + v * LANES, &gz, sizeof gz);
                        }
                    if (gx) product(gy, weight + group * square, gx + r * all + c, CHANNELS, all, count);
                    if (!dw) continue;
                    vector xs[TOGETHER][VECTORS];
                    for (int i = 0; i < TOGETHER; i++)
                        memcpy(xs[i], x + (r + (i < count ? i : 0)) * all + c, sizeof xs[i]);
                    for (int o = 0; o < CHANNELS; o++) {
                        vector *to = (vector *)(d + o * CHANNELS);
                        for (int v = 0; v < VECTORS; v++) {
                            vector sum = to[v];
                            for (int i = 0; i < TOGETHER; i++) sum += gy[i * CHANNELS + o] * xs[i][v];
                            to[v] = sum;
                        }
                    }
                }
            }
        }
#pragma omp barrier
#pragma omp master
        if (dw)
            for (int64_t i = 0; i < groups * square; i++) {
                dw[i] = 0;
                for (int t = 0; t < omp_get_num_threads(); t++) dw[i] += products[t * groups * square + i];
            }
    }
    free(sums);
    free(parts);
    free(products);
    return 0;
}
