/* What the C sources of the package share; native.py compiles them. */

#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#ifdef _OPENMP
#include <omp.h>
#else
#define omp_get_thread_num() 0
#define omp_get_num_threads() 1
#endif

#ifdef REAL
typedef REAL real;
#endif

/* This thread's part of so many rows: from the first up to the last, which is not its own. */
static inline int64_t first_row(int64_t rows) { return rows * omp_get_thread_num() / omp_get_num_threads(); }
static inline int64_t last_row(int64_t rows) { return rows * (omp_get_thread_num() + 1) / omp_get_num_threads(); }
