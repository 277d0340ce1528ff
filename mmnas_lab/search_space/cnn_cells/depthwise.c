/* The gradient of a depthwise convolution by its kernel; see depthwise.py, which compiles this.

   Tensors are (batch, height, width, channels). A thread takes a few channels at a time, as many as a vector
   register holds, through all samples: it copies them, with zeros around them, to where they lie close. */

#include "native.h"

#ifdef __AVX512F__
#define LANES (64 / sizeof(real))
#else
#define LANES (32 / sizeof(real))
#endif
typedef real vector __attribute__((vector_size(LANES * sizeof(real))));

typedef struct {
    int64_t height, width, stride, dilation, padded_width; /* height and width of the result */
} shape;

/* Into `sums` (size x size) goes, for each entry of the kernel, the sum over positions of g times the x that
   the entry reads there. The sums stay in registers. */
#define TAPS(SIZE)                                                                                  \
    static void taps_##SIZE(const shape *s, const vector *x, const vector *g, vector *sums) {       \
        vector own[SIZE * SIZE];                                                                    \
        memset(own, 0, sizeof own);                                                                 \
        for (int64_t i = 0; i < s->height; i++)                                                     \
            for (int64_t j = 0; j < s->width; j++) {                                                \
                const vector *at = x + i * s->stride * s->padded_width + j * s->stride;             \
                const vector here = g[i * s->width + j];                                            \
                _Pragma("GCC unroll 8") for (int u = 0; u < SIZE; u++) {                            \
                    const vector *row = at + u * s->dilation * s->padded_width;                     \
                    _Pragma("GCC unroll 8") for (int v = 0; v < SIZE; v++)                          \
                        own[u * SIZE + v] += here * row[v * s->dilation];                           \
                }                                                                                   \
            }                                                                                       \
        memcpy(sums, own, sizeof own);                                                              \
    }

TAPS(3)
TAPS(5)

/* Any other size. */
static void taps(const shape *s, int size, const vector *x, const vector *g, vector *sums) {
    for (int t = 0; t < size * size; t++) {
        const vector *at = x + (t / size * s->padded_width + t % size) * s->dilation;
        vector own;
        memset(&own, 0, sizeof own);
        for (int64_t i = 0; i < s->height; i++)
            for (int64_t j = 0; j < s->width; j++)
                own += g[i * s->width + j] * at[i * s->stride * s->padded_width + j * s->stride];
        sums[t] = own;
    }
}

static int64_t lanes(int64_t channels, int64_t first) {
    return channels - first < (int64_t)LANES ? channels - first : (int64_t)LANES;
}

/* `count` of the channels of each of `width` positions, the other lanes zero. */
static void load(vector *to, const real *from, int64_t width, int64_t channels, int64_t count) {
    for (int64_t j = 0; j < width; j++) {
        if (count == LANES)
            memcpy(to + j, from + j * channels, sizeof(vector));
        else {
            memset(to + j, 0, sizeof(vector));
            memcpy(to + j, from + j * channels, count * sizeof(real));
        }
    }
}

/* out (channels, size, size) from x (batch, height, width, channels) and g (batch, out_height, out_width,
   channels). Returns 0, or 1 without memory. */
int kernel_gradient(int64_t batch, int64_t height, int64_t width, int64_t channels, int64_t out_height,
                    int64_t out_width, int size, int stride, int dilation, const real *x, const real *g,
                    real *out, int threads) {
    const int64_t padding = (int64_t)dilation * (size / 2), taps_count = (int64_t)size * size;
    const int64_t padded_height = height + 2 * padding, padded_width = width + 2 * padding;
    const shape s = {out_height, out_width, stride, dilation, padded_width};
    const int64_t positions = out_height * out_width, blocks = (channels + LANES - 1) / LANES;
    int failed = 0;
#pragma omp parallel num_threads(threads)
    {
        const int64_t begin = blocks * omp_get_thread_num() / omp_get_num_threads();
        const int64_t end = blocks * (omp_get_thread_num() + 1) / omp_get_num_threads();
        const int64_t cells = padded_height * padded_width + positions + taps_count;
        vector *padded = aligned_alloc(sizeof(vector), cells * sizeof(vector));
        double *totals = calloc((end - begin) * taps_count * LANES + 1, sizeof(double));
        if (!padded || !totals) {
#pragma omp atomic write
            failed = 1;
        } else {
            vector *gradient = padded + padded_height * padded_width, *sums = gradient + positions;
            memset(padded, 0, padded_height * padded_width * sizeof(vector));
            for (int64_t b = 0; b < batch; b++)
                for (int64_t block = begin; block < end; block++) {
                    const int64_t first = block * LANES, count = lanes(channels, first);
                    const real *xb = x + b * height * width * channels + first;
                    for (int64_t i = 0; i < height; i++)
                        load(padded + (i + padding) * padded_width + padding, xb + i * width * channels, width,
                             channels, count);
                    load(gradient, g + b * positions * channels + first, positions, channels, count);
                    if (size == 3)
                        taps_3(&s, padded, gradient, sums);
                    else if (size == 5)
                        taps_5(&s, padded, gradient, sums);
                    else
                        taps(&s, size, padded, gradient, sums);
                    double *total = totals + (block - begin) * taps_count * LANES;
                    for (int64_t t = 0; t < taps_count; t++)
                        for (int64_t lane = 0; lane < count; lane++) total[t * LANES + lane] += sums[t][lane];
                }
            for (int64_t block = begin; block < end; block++) {
                const int64_t first = block * LANES, count = lanes(channels, first);
                const double *total = totals + (block - begin) * taps_count * LANES;
                for (int64_t lane = 0; lane < count; lane++)
                    for (int64_t t = 0; t < taps_count; t++)
                        out[(first + lane) * taps_count + t] = total[t * LANES + lane];
            }
        }
        free(padded);
        free(totals);
    }
    return failed;
}
