/* Several weighted sums of the same tensors, read once; see mixtures.py, which compiles this.

   A tensor has `rows` of `channels` entries; `plus` has rows of sums x channels. Threads take consecutive rows. */

#include "native.h"

enum { CHUNK = 512 }; /* entries of each tensor that are worked on at a time */

/* out[e] = part e of plus + sum over t of weights[e, t] x[t]; plus may be null. */
void forward(int64_t rows, int64_t channels, int sums, int terms, const real *const *x, const real *weights,
             const real *plus, real *const *out, int threads) {
    const int64_t step = channels < CHUNK ? CHUNK / channels : 1;
#pragma omp parallel num_threads(threads)
    for (int64_t begin = first_row(rows), last = last_row(rows); begin < last; begin += step) {
        const int64_t end = begin + step < last ? begin + step : last, size = (end - begin) * channels;
        for (int e = 0; e < sums; e++) {
            real *to = out[e] + begin * channels;
            if (plus)
                for (int64_t r = begin; r < end; r++)
                    memcpy(to + (r - begin) * channels, plus + (r * sums + e) * channels, channels * sizeof(real));
            else
                memset(to, 0, size * sizeof(real));
            for (int t = 0; t < terms; t++) {
                const real *from = x[t] + begin * channels, w = weights[e * terms + t];
#pragma omp simd
                for (int64_t i = 0; i < size; i++) to[i] += w * from[i];
            }
        }
    }
}

/* Given g[e]: gx[t] = sum over e of weights[e, t] g[e], where it is not null; the gradient of plus, where it is
   not null; and for each thread the sums of g[e] x[t] over its rows into dots (threads, sums, terms), which
   hold 0, unless x is null. */
void backward(int64_t rows, int64_t channels, int sums, int terms, const real *const *x, const real *weights,
              const real *const *g, real *const *gx, real *gplus, double *dots, int threads) {
    const int64_t step = channels < CHUNK ? CHUNK / channels : 1;
#pragma omp parallel num_threads(threads)
    for (int64_t begin = first_row(rows), last = last_row(rows); begin < last; begin += step) {
        const int64_t end = begin + step < last ? begin + step : last, size = (end - begin) * channels;
        double *own = dots + omp_get_thread_num() * sums * terms;
        for (int t = 0; t < terms; t++) {
            const real *xt = x ? x[t] + begin * channels : 0;
            real *to = gx[t] ? gx[t] + begin * channels : 0;
            for (int e = 0; e < sums; e++) {
                const real *from = g[e] + begin * channels, w = weights[e * terms + t];
                if (xt) {
                    real dot = 0;
#pragma omp simd reduction(+ : dot)
                    for (int64_t i = 0; i < size; i++) dot += from[i] * xt[i];
                    own[e * terms + t] += dot;
                }
                if (!to) continue;
                if (e == 0) memset(to, 0, size * sizeof(real));
#pragma omp simd
                for (int64_t i = 0; i < size; i++) to[i] += w * from[i];
            }
        }
        for (int e = 0; gplus && e < sums; e++)
            for (int64_t r = begin; r < end; r++)
                memcpy(gplus + (r * sums + e) * channels, g[e] + r * channels, channels * sizeof(real));
    }
}
