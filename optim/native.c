/* Asro and AccAsro in one pass over memory, DASGO in two; see native.py, which compiles this file, and asro.py,
   accasro.py and dasgo.py, which hold the same formulas in PyTorch. Every operation is rounded as written, so that results do not depend on how the
   work is divided among threads. Without OpenMP one thread does it all. */
#include <math.h>
#include <stdint.h>

#define API __attribute__((visibility("default")))
/* A loop that is inlined loses the promise that its pointers do not overlap, and with it its vector instructions. */
#define NOINLINE __attribute__((noinline))
#define MIN(a, b) ((a) < (b) ? (a) : (b))
#define MAX(a, b) ((a) > (b) ? (a) : (b))

typedef struct {
    float keep, step_size, eps, weight1, weight2, beta2, decrement, min_scale, max_scale, increment;
} Scalars;

typedef float *restrict Floats;
typedef const float *restrict Inputs;

/* Whether two values are of opposite signs, none of them zero. */
static inline int flipped(float a, float b) { return ((a < 0) & (b > 0)) | ((a > 0) & (b < 0)); }

static inline float lerp(float a, float b, float weight) { return a + weight * (b - a); }

/* a where the condition holds, else b; by bits, since gcc would make a branch of a condition on what is stored. */
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

/* Calls `body` with shares `begin`..`end` of 0..total, one a thread. */
#define IN_SHARES(total, threads, body)                                   \
    _Pragma("omp parallel for num_threads(threads) schedule(static, 1)")  \
    for (int64_t thread = 0; thread < (threads); thread++) {              \
        int64_t begin = (total) * thread / (threads);                     \
        int64_t end = (total) * (thread + 1) / (threads);                 \
        body;                                                             \
    }

/* Calls `body` with the part `first`..`stop` of each tensor k that lies in begin..end, all elements counted through;
   tensor k has lengths[k]. `tensors` holds the pointers of the first tensor's row (parameter, gradient, state...),
   then those of the second's, and so on. */
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
    IN_SHARES(total, threads, IN_ROWS(5, asro_range(stop - first, F(0), F(1), F(2), F(3), F(4), *c)))
}

API void accasro(int64_t rows, const int64_t *lengths, void *const *tensors, int64_t threads, const Scalars *c) {
    int64_t total = sum(rows, lengths, 1);
    IN_SHARES(total, threads, IN_ROWS(7, accasro_range(stop - first, F(0), F(1), F(2), F(3), F(4), F(5),
                                                       (int8_t *)row[6] + first, *c)))
}

/* A matrix's rows first..stop - 1: the momentum moves towards the gradient, and the squares of both add up a column. */
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

/* A matrix's rows first..stop - 1: W = keep W + M diag(factors). */
NOINLINE static void step_rows(int64_t first, int64_t stop, int64_t columns, float *weight, const float *momentum,
                               Inputs factors, float keep) {
    for (int64_t i = first; i < stop; i++) {
        Floats w = weight + i * columns;
        Inputs m = momentum + i * columns;
#pragma omp simd
        for (int64_t j = 0; j < columns; j++) w[j] = w[j] * keep + m[j] * factors[j];
    }
}

/* Calls `body` with the rows `first`..`stop` of each matrix k that lie in begin..end, the rows of all counted through;
   matrix k is shapes[2k] x shapes[2k + 1], and `column` counts the columns of those before it. */
#define IN_MATRICES(body)                                                                \
    int64_t offset = 0, column = 0;                                                      \
    for (int64_t k = 0; k < matrices && offset < end; k++) {                             \
        int64_t rows = shapes[2 * k], columns = shapes[2 * k + 1];                       \
        int64_t first = MAX(begin - offset, 0), stop = MIN(end - offset, rows);          \
        if (first < stop) body;                                                          \
        offset += rows;                                                                  \
        column += columns;                                                               \
    }

/* DASGO's first pass. tensors[2k...]: gradient, momentum. `sums`, zeros, has two numbers a column of all matrices for
   each thread, in double precision, whose range no square of a float leaves: all gradients' squares, all momenta's. */
API void dasgo_moments(int64_t matrices, const int64_t *shapes, void *const *tensors, int64_t threads, float weight,
                       double *sums) {
    int64_t total = sum(matrices, shapes, 2), all_columns = sum(matrices, shapes + 1, 2);
    IN_SHARES(total, threads, {
        double *own = sums + 2 * all_columns * thread;
        IN_MATRICES(moments_of_rows(first, stop, columns, tensors[2 * k], tensors[2 * k + 1], weight, own + column,
                                    own + all_columns + column))
    })
}

/* DASGO's second pass. tensors[3k...]: weight, momentum, factors, one a column. */
API void dasgo_step(int64_t matrices, const int64_t *shapes, void *const *tensors, int64_t threads, float keep) {
    int64_t total = sum(matrices, shapes, 2);
    IN_SHARES(total, threads, IN_MATRICES(step_rows(first, stop, columns, tensors[3 * k], tensors[3 * k + 1],
                                                    tensors[3 * k + 2], keep)))
}
