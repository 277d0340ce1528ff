/* What cells do beside products and convolutions, in one pass over the tensors each way; see fused.py.

   Tensors are (rows, channels), row by row: a row is a position of a sample. Threads take consecutive rows.
   Sums over rows are made in `real` within a block and in double between blocks and threads. NaN stays NaN. */

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#ifdef _OPENMP
#include <omp.h>
#else
#define omp_get_thread_num() 0
#define omp_get_num_threads() 1
#endif

typedef REAL real;
enum { NONE, RELU, GLU }; /* activations */
enum { BLOCK = 64 /* rows */, WIDE = 256 /* columns */, CHUNK = 1024 /* entries */ };

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

static int64_t first_row(int64_t rows) { return rows * omp_get_thread_num() / omp_get_num_threads(); }
static int64_t last_row(int64_t rows) { return rows * (omp_get_thread_num() + 1) / omp_get_num_threads(); }

/* Few channels make short loops: where nothing depends on a row's number, so many rows are taken as one wide
   row, `tile` times the channels side by side. */
static int64_t tile_of(int64_t rows, int64_t channels) {
    int64_t tile = 1;
    while (tile * channels < WIDE && rows % (2 * tile) == 0) tile *= 2;
    return tile;
}

static void repeat(int64_t channels, int64_t tile, const real *from, real *to) {
    for (int64_t t = 0; t < tile; t++) memcpy(to + t * channels, from, channels * sizeof(real));
}

/* What a pass works on. */
typedef struct {
    int64_t rows, channels, tile, wide; /* wide rows: rows / tile of tile * channels */
    real *parts;                        /* (threads, 2, wide), sums of a block */
    double *sums;                       /* (threads, 2, wide) */
    double *totals;                     /* (2, channels) */
    real *columns;                      /* (count, wide), given for each column */
} work;

static int open_work(work *w, int64_t rows, int64_t channels, int64_t tile, int threads, int count) {
    w->rows = rows / tile;
    w->channels = channels;
    w->tile = tile;
    w->wide = tile * channels;
    w->parts = malloc((threads * 2 + count) * w->wide * sizeof(real));
    w->sums = calloc(threads * 2 * w->wide + 2 * channels, sizeof(double));
    w->columns = w->parts + threads * 2 * w->wide;
    w->totals = w->sums + threads * 2 * w->wide;
    return w->parts && w->sums;
}

static void close_work(work *w) {
    free(w->parts);
    free(w->sums);
}

/* Sums of all threads and tiles into the totals. */
static void gather(work *w, int threads) {
    for (int64_t t = 0; t < 2 * threads; t++)
        for (int64_t i = 0; i < w->wide; i++)
            w->totals[t % 2 * w->channels + i % w->channels] += w->sums[t * w->wide + i];
}

/* Adds to this thread's sums those over its rows of x - start and of its square. */
static void add_moments(work *w, const real *x, const real *start) {
    const int64_t wide = w->wide, stop = last_row(w->rows);
    double *sums = w->sums + omp_get_thread_num() * 2 * wide;
    real *part = w->parts + omp_get_thread_num() * 2 * wide;
    for (int64_t begin = first_row(w->rows); begin < stop; begin += BLOCK) {
        memset(part, 0, 2 * wide * sizeof(real));
        for (int64_t r = begin; r < begin + BLOCK && r < stop; r++) {
            const real *xr = x + r * wide;
#pragma omp simd
            for (int64_t c = 0; c < wide; c++) {
                real v = xr[c] - start[c];
                part[c] += v;
                part[wide + c] += v * v;
            }
        }
        for (int64_t c = 0; c < 2 * wide; c++) sums[c] += part[c];
    }
}

/* BatchNorm with batch statistics, an activation, and dropout unless `d` is null.

   x (rows, channels), out (rows, channels) or, gated, (rows, channels / 2); `gate` of out's shape is left with
   the gates, 0 where dropped. Without `weight` it is 1, without `bias` 0. `statistics` (5, channels) are left
   as mean, variance, 1 / standard deviation, and what they and the affine map make of a column, slope x +
   shift. Returns 0, or 1 without memory. */
int forward(int64_t rows, int64_t channels, int activation, const real *x, const real *weight,
            const real *bias, double eps, const draw *d, real *statistics, real *gate, real *out, int threads) {
    real *mean = statistics, *var = mean + channels, *rstd = var + channels, *slope = rstd + channels,
         *shift = slope + channels;
    const real scale = d ? d->scale : 1, lowest = activation == RELU ? 0 : -INFINITY;
    work w;
    if (!open_work(&w, rows, channels, d || activation == GLU ? 1 : tile_of(rows, channels), threads, 3)) {
        close_work(&w);
        return 1;
    }
    const int64_t wide = w.wide, half = channels / 2;
    real *start = w.columns, *slopes = start + wide, *shifts = slopes + wide;
    repeat(channels, w.tile, x, start);
#pragma omp parallel num_threads(threads)
    {
        const int64_t stop = last_row(w.rows);
        add_moments(&w, x, start);
#pragma omp barrier
#pragma omp master
        {
            gather(&w, omp_get_num_threads());
            for (int64_t c = 0; c < channels; c++) {
                double first = w.totals[c] / rows, variance = w.totals[channels + c] / rows - first * first;
                if (variance < 0) variance = 0;
                mean[c] = x[c] + first;
                var[c] = variance;
                rstd[c] = 1 / sqrt(variance + eps);
                slope[c] = (weight ? weight[c] : 1) * rstd[c];
                shift[c] = (bias ? bias[c] : 0) - mean[c] * slope[c];
            }
            repeat(channels, w.tile, slope, slopes);
            repeat(channels, w.tile, shift, shifts);
        }
#pragma omp barrier
        for (int64_t r = first_row(w.rows); r < stop; r++) {
            const uint32_t row = d ? row_key(r, d) : 0;
            const real *xr = x + r * wide;
            if (activation == GLU) {
                real *q = gate + r * half, *o = out + r * half;
#pragma omp simd
                for (int64_t c = 0; c < half; c++)
                    q[c] = 1 / (1 + exponential(-(xr[half + c] * slopes[half + c] + shifts[half + c])));
                if (d)
#pragma omp simd
                    for (int64_t c = 0; c < half; c++) q[c] = is_dropped(row, c, d) ? 0 : q[c];
#pragma omp simd
                for (int64_t c = 0; c < half; c++) o[c] = (xr[c] * slopes[c] + shifts[c]) * q[c] * scale;
            } else {
                real *o = out + r * wide;
#pragma omp simd
                for (int64_t c = 0; c < wide; c++) {
                    real z = xr[c] * slopes[c] + shifts[c];
                    o[c] = z <= lowest ? lowest : z;
                }
                if (d)
#pragma omp simd
                    for (int64_t c = 0; c < wide; c++) o[c] = is_dropped(row, c, d) ? 0 : o[c] * scale;
            }
        }
    }
    close_work(&w);
    return 0;
}

/* Into gz goes the gradient of the activation of a row, given x, g and what is kept. */
static inline void activation_gradient(int activation, int64_t wide, const real *x, const real *kept,
                                       const real *g, const real *slopes, const real *shifts, real scale,
                                       real *gz) {
    if (activation == GLU) {
        const int64_t half = wide / 2;
#pragma omp simd
        for (int64_t c = 0; c < half; c++) {
            real v = g[c] * scale * kept[c];
            gz[c] = v;
            gz[half + c] = v * (x[c] * slopes[c] + shifts[c]) * (1 - kept[c]);
        }
    } else
#pragma omp simd
        for (int64_t c = 0; c < wide; c++) gz[c] = kept[c] != 0 ? g[c] * scale : 0;
}

/* Gradients of `forward`, given g of out's shape and `kept`: the gates, of a ReLU the result, or nothing.
   `gx` (rows, channels) and `affine` (2, channels), of weight and bias, are written. */
int backward(int64_t rows, int64_t channels, int activation, const real *x, const real *kept, const real *g,
             const real *statistics, double scale, real *gx, real *affine, int threads) {
    const real *mean = statistics, *rstd = mean + 2 * channels, *slope = rstd + channels,
               *shift = slope + channels;
    work w;
    if (!open_work(&w, rows, channels, activation == GLU ? 1 : tile_of(rows, channels), threads, 6)) {
        close_work(&w);
        return 1;
    }
    const int64_t wide = w.wide, narrow = activation == GLU ? wide / 2 : wide;
    real *means = w.columns, *slopes = means + wide, *shifts = slopes + wide;
    real *of_x = shifts + wide, *of_one = of_x + wide; /* x's gradient: slope gz + of_x (x - mean) + of_one */
    repeat(channels, w.tile, mean, means);
    repeat(channels, w.tile, slope, slopes);
    repeat(channels, w.tile, shift, shifts);
#pragma omp parallel num_threads(threads)
    {
        const int64_t stop = last_row(w.rows);
        double *sums = w.sums + omp_get_thread_num() * 2 * wide;
        real *part = w.parts + omp_get_thread_num() * 2 * wide;
        for (int64_t begin = first_row(w.rows); begin < stop; begin += BLOCK) {
            memset(part, 0, 2 * wide * sizeof(real));
            for (int64_t r = begin; r < begin + BLOCK && r < stop; r++) {
                const real *xr = x + r * wide, *gz = g + r * wide;
                if (activation != NONE) {
                    activation_gradient(activation, wide, xr, kept + r * narrow, g + r * narrow, slopes, shifts,
                                        scale, gx + r * wide);
                    gz = gx + r * wide;
                }
#pragma omp simd
                for (int64_t c = 0; c < wide; c++) {
                    part[c] += gz[c];
                    part[wide + c] += gz[c] * (xr[c] - means[c]);
                }
            }
            for (int64_t c = 0; c < 2 * wide; c++) sums[c] += part[c];
        }
#pragma omp barrier
#pragma omp master
        {
            gather(&w, omp_get_num_threads());
            for (int64_t c = 0; c < channels; c++) {
                double first = w.totals[c], second = w.totals[channels + c];
                affine[c] = second * rstd[c];
                affine[channels + c] = first;
                of_x[c] = -slope[c] * rstd[c] * rstd[c] * second / rows;
                of_one[c] = -slope[c] * first / rows;
            }
            for (int64_t t = 1; t < w.tile; t++) {
                memcpy(of_x + t * channels, of_x, channels * sizeof(real));
                memcpy(of_one + t * channels, of_one, channels * sizeof(real));
            }
        }
#pragma omp barrier
        for (int64_t r = first_row(w.rows); r < stop; r++) {
            const real *xr = x + r * wide, *gz = (activation == NONE ? g : gx) + r * wide;
            real *to = gx + r * wide;
#pragma omp simd
            for (int64_t c = 0; c < wide; c++)
                to[c] = slopes[c] * gz[c] + of_x[c] * (xr[c] - means[c]) + of_one[c];
        }
    }
    close_work(&w);
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
