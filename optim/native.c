/* Asro and AccAsro in one pass over memory, DASGO in two. native.py compiles this file; asro.py, accasro.py and
   dasgo.py have the same formulas in PyTorch. Every operation is rounded as written, so results do not depend on the
   division of the work among threads. Without OpenMP, one thread does all the work. */
#include <math.h>
#include <stdint.h>

#define API __attribute__((visibility("default")))
/* Inlined loops lose `restrict`, and the compiler would no longer vectorize them. */
#define NOINLINE __attribute__((noinline))
#define MIN(a, b) ((a) < (b) ? (a) : (b))
#define MAX(a, b) ((a) > (b) ? (a) : (b))

typedef struct {
    float keep, step_size, eps, weight1, weight2, beta2, decrement, min_scale, max_scale, increment;
} Scalars;

typedef float *restrict Floats;
typedef const float *restrict Inputs;

/* Whether two values have opposite signs, and neither is zero. */
static inline int flipped(float a, float b) { return ((a < 0) & (b > 0)) | ((a > 0) & (b < 0)); }

static inline float lerp(float a, float b, float weight) { return a + weight * (b - a); }

/* condition ? a : b, with bit masks: gcc would compile the ternary to a branch. */
static inline float pick(int condition, float a, float b) {
    union { float value; uint32_t bits; } x = {a}, y = {b};
    uint32_t mask = -(uint32_t)condition;
    x.bits = (x.bits & mask) | (y.bits & ~mask);
    return x.value;
}

static inline float clamp(float s, float low, float high) {
    float raised = s < low ? low : s;
    return raised > high ? high : raised;
}

NOINLINE static void asro_range(int64_t n, Floats p, Inputs g, Floats m, Floats v, Floats s, const Scalars c) {
#pragma omp simd
    for (int64_t i = 0; i < n; i++) {
        float moment = lerp(m[i], g[i], c.weight1);
        float square = v[i] * c.beta2 + c.weight2 * g[i] * g[i];
        float scale = s[i];
        scale = pick(flipped(m[i], moment), scale - c.decrement, scale);
        scale = clamp(scale, c.min_scale, c.max_scale);
        m[i] = moment;
        v[i] = square;
        s[i] = scale;
        p[i] = p[i] * c.keep - c.step_size * (moment / (sqrtf(square) + c.eps) * scale);
    }
}

NOINLINE static void accasro_range(int64_t n, Floats p, Inputs g, Floats m, Floats v, Floats s, Floats saved,
                                   int8_t *restrict last_sign, const Scalars c) {
#pragma omp simd
    for (int64_t i = 0; i < n; i++) {
        float moment = lerp(m[i], g[i], c.weight1);
        float square = v[i] * c.beta2 + c.weight2 * g[i] * g[i];
        int grad_flipped = flipped(g[i], last_sign[i]);
        int moment_flipped = flipped(m[i], moment);
        float scale = s[i], old = saved[i];
        scale = pick(grad_flipped, old, scale);
        scale = pick(moment_flipped, scale - c.decrement, scale);
        saved[i] = pick(moment_flipped, scale, old);
        scale = pick(grad_flipped, scale, scale + c.increment);
        scale = clamp(scale, c.min_scale, c.max_scale);
        m[i] = moment;
        v[i] = square;
        s[i] = scale;
        last_sign[i] = (int8_t)((g[i] > 0) - (g[i] < 0));
        p[i] = p[i] * c.keep - c.step_size * (moment / (sqrtf(square) + c.eps) * scale);
    }
}

/* Runs `body` in each thread, with its range `begin`..`end` of 0..total. */
#define IN_THREADS(total, threads, body)                                  \
    _Pragma("omp parallel for num_threads(threads) schedule(static, 1)")  \
    for (int64_t thread = 0; thread < (threads); thread++) {              \
        int64_t begin = (total) * thread / (threads);                     \
        int64_t end = (total) * (thread + 1) / (threads);                 \
        body;                                                             \
    }

/* Runs `body` for each parameter k with elements in begin..end, an index range over the elements of all parameters;
   first..stop is the range within the parameter, which has lengths[k] elements. `tensors` holds the pointers of the
   first parameter's row (parameter, gradient, state...), then those of the second, and so on. */
#define IN_ROWS(columns, body)                                                        \
    int64_t offset = 0;                                                               \
    for (int64_t k = 0; k < rows && offset < end; offset += lengths[k++]) {           \
        int64_t first = MAX(begin - offset, 0), stop = MIN(end - offset, lengths[k]); \
        void *const *row = tensors + k * (columns);                                   \
        if (first < stop) body;                                                       \
    }

#define F(column) ((float *)row[column] + first)

static int64_t sum(int64_t count, const int64_t *values, int64_t stride) {
    int64_t total = 0;
    for (int64_t i = 0; i < count; i++) total += values[i * stride];
    return total;
}

API void asro(int64_t rows, const int64_t *lengths, void *const *tensors, int64_t threads, const Scalars *c) {
    int64_t total = sum(rows, lengths, 1);
    IN_THREADS(total, threads, IN_ROWS(5, asro_range(stop - first, F(0), F(1), F(2), F(3), F(4), *c)))
}

API void accasro(int64_t rows, const int64_t *lengths, void *const *tensors, int64_t threads, const Scalars *c) {
    int64_t total = sum(rows, lengths, 1);
    IN_THREADS(total, threads, IN_ROWS(7, accasro_range(stop - first, F(0), F(1), F(2), F(3), F(4), F(5),
                                                        (int8_t *)row[6] + first, *c)))
}

/* For rows first..stop - 1 of a matrix: update the momentum, and add the squares of both to the sums of the columns. */
NOINLINE static void moments_of_rows(int64_t first, int64_t stop, int64_t columns, const float *grad, float *momentum,
                                     float weight, double *restrict grad_squares, double *restrict momentum_squares) {
    for (int64_t i = first; i < stop; i++) {
        Inputs g = grad + i * columns;
        Floats m = momentum + i * columns;
#pragma omp simd
        for (int64_t j = 0; j < columns; j++) {
            float moment = lerp(m[j], g[j], weight);
            grad_squares[j] += (double)g[j] * g[j];
            momentum_squares[j] += (double)moment * moment;
            m[j] = moment;
        }
    }
}

/* For rows first..stop - 1 of a matrix: W = keep W + M diag(factors). */
NOINLINE static void step_rows(int64_t first, int64_t stop, int64_t columns, float *weight, const float *momentum,
                               Inputs factors, float keep) {
    for (int64_t i = first; i < stop; i++) {
        Floats w = weight + i * columns;
        Inputs m = momentum + i * columns;
#pragma omp simd
        for (int64_t j = 0; j < columns; j++) w[j] = w[j] * keep + m[j] * factors[j];
    }
}

/* Runs `body` for each matrix k with rows in begin..end, an index range over the rows of all matrices; first..stop are
   the rows within the matrix, of shape shapes[2k] x shapes[2k + 1]. `column` is the number of columns before it. */
#define IN_MATRICES(body)                                                                \
    int64_t offset = 0, column = 0;                                                      \
    for (int64_t k = 0; k < matrices && offset < end; k++) {                             \
        int64_t rows = shapes[2 * k], columns = shapes[2 * k + 1];                       \
        int64_t first = MAX(begin - offset, 0), stop = MIN(end - offset, rows);          \
        if (first < stop) body;                                                          \
        offset += rows;                                                                  \
        column += columns;                                                               \
    }

/* DASGO's first pass. tensors[2k...]: gradient, momentum. `sums`, initially zero, has for each thread the sums of
   squares of all gradient columns, then of all momentum columns; in double, where squares of floats cannot overflow. */
API void dasgo_moments(int64_t matrices, const int64_t *shapes, void *const *tensors, int64_t threads, float weight,
                       double *sums) {
    int64_t total = sum(matrices, shapes, 2), all_columns = sum(matrices, shapes + 1, 2);
    IN_THREADS(total, threads, {
        double *own = sums + 2 * all_columns * thread;
        IN_MATRICES(moments_of_rows(first, stop, columns, tensors[2 * k], tensors[2 * k + 1], weight, own + column,
                                    own + all_columns + column))
    })
}

/* DASGO's second pass. tensors[3k...]: weight, momentum, factors (one per column). */
API void dasgo_step(int64_t matrices, const int64_t *shapes, void *const *tensors, int64_t threads, float keep) {
    int64_t total = sum(matrices, shapes, 2);
    IN_THREADS(total, threads, IN_MATRICES(step_rows(first, stop, columns, tensors[3 * k], tensors[3 * k + 1],
                                                     tensors[3 * k + 2], keep)))
}
