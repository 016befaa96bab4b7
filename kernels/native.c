/* The loops that NumPy is slow at. Nothing here checks anything: kernels/native.py does, before every call.
 *
 * Small numbers keep to ranges in which every result is the NumPy reference's, bit for bit; others are not sent here.
 * Built with -ffp-contract=off: a fused multiply-add would round once where the reference rounds twice.
 */
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#define INLINE static inline __attribute__((always_inline))

/* Chosen when the library is loaded, so that one build serves every x86-64; needs glibc's loader. */
#if defined(__x86_64__) && defined(__GLIBC__)
#define WIDE __attribute__((target_clones("avx2", "default")))
#else
#define WIDE
#endif

INLINE float as_float(uint32_t bits)
{
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

INLINE uint32_t as_bits(float value)
{
    uint32_t bits;
    memcpy(&bits, &value, 4);
    return bits;
}

/* bfloat16 to nearest even in the upper half; no NaN that could carry into the sign comes here. */
INLINE uint32_t rounded(float value)
{
    uint32_t bits = as_bits(value);
    return bits + 0x7fff + (bits >> 16 & 1);
}

/* ---- Whether no number has an exponent of ones only: those are NaN and infinity. ---- */

#define FINITE(bits)                                                                                              \
    WIDE int finite##bits(const uint##bits##_t *values, size_t count, uint##bits##_t infinity)                    \
    {                                                                                                             \
        for (size_t at = 0; at < count; at += 4096) {                                                             \
            size_t end = count - at < 4096 ? count : at + 4096;                                                   \
            uint##bits##_t odd = 0;                                                                               \
            for (size_t i = at; i < end; i++)                                                                     \
                odd |= (values[i] & infinity) == infinity;                                                        \
            if (odd)                                                                                              \
                return 0;                                                                                         \
        }                                                                                                         \
        return 1;                                                                                                 \
    }

FINITE(16)
FINITE(32)

/* ---- FP8: an e4m3 code moved up by 20 bits is its value / 2^120 as a float. Codes below 8 give subnormal floats, at
 * which many processors are a hundred times slower: runs that hold some (`tiny`) go another, twice as long way. ---- */

/* scale: where nothing is tiny, times 2^120 */
INLINE float fp8_size(uint32_t code, int tiny)
{
    uint32_t small = (uint32_t) - (code < 8), units = as_bits((float)(int32_t)code * 0x1p-9f);
    return as_float(tiny ? (units & small) | (((code << 20) + (120u << 23)) & ~small) : code << 20);
}

INLINE uint16_t fp8_value(uint32_t code, float scale, int tiny)
{
    uint32_t size = code & 0x7f, nan = (uint32_t) - (size == 0x7f);
    uint32_t value = rounded(fp8_size(size, tiny) * scale) >> 16;
    return (uint16_t)(((value & ~nan) | (nan & 0x7fc0)) ^ (code & 0x80) << 8);
}

/* The code whose value is the number, if there is one; adds to `wrong` where there is none. scale, inverse: positive */
INLINE uint8_t fp8_code(uint32_t bits, float scale, float inverse, int tiny, uint32_t *wrong)
{
    uint32_t size = bits & 0x7fff, found = as_bits(as_float(size << 16) * inverse);
    int32_t code = (int32_t)((found + 0x80000) >> 20);
    if (tiny) {
        int32_t small = -(int32_t)(found < 121u << 23), units = as_bits(as_float(found) + 0x1p14f) & 0x1f;
        code = (units & small) | ((code - (120 << 3)) & ~small);
    }
    code = code < 0x7e ? code : 0x7e;
    *wrong |= rounded(fp8_size((uint32_t)code, tiny) * scale) >> 16 ^ size;
    return (uint8_t)((uint32_t)code | (bits >> 8 & 0x80));
}

INLINE void fp8_values(const uint8_t *restrict codes, size_t count, float scale, int tiny, uint16_t *restrict out)
{
    for (size_t i = 0; i < count; i++)
        out[i] = fp8_value(codes[i], scale, tiny);
}

INLINE void fp8_codes(const uint16_t *restrict bits, size_t count, float scale, int tiny, uint8_t *restrict out,
                      uint32_t *wrong)
{
    float inverse = 1 / scale;
    for (size_t i = 0; i < count; i++)
        out[i] = fp8_code(bits[i], scale, inverse, tiny, wrong);
}

/* codes [rows, columns] times scales [ceil(rows / high), ceil(columns / wide)] as bfloat16 */
WIDE void fp8_decode(const uint8_t *codes, size_t rows, size_t columns, const float *scales, size_t high, size_t wide,
                     uint16_t *out)
{
    size_t across = (columns + wide - 1) / wide;
    for (size_t row = 0; row < rows; row++)
        for (size_t block = 0, at = 0; block < across; block++, at += wide) {
            float scale = scales[row / high * across + block];
            size_t count = columns - at < wide ? columns - at : wide;
            const uint8_t *from = codes + row * columns + at;
            uint8_t tiny = 0;
            for (size_t i = 0; i < count; i++)
                tiny |= (uint8_t)((from[i] & 0x7f) - 1) < 7;
            if (tiny)
                fp8_values(from, count, scale, 1, out + row * columns + at);
            else
                fp8_values(from, count, scale * 0x1p120f, 0, out + row * columns + at);
        }
}

/* The other way; whether every code gives back its number. */
WIDE int fp8_encode(const uint16_t *bits, size_t rows, size_t columns, const float *scales, size_t high, size_t wide,
                    uint8_t *out)
{
    size_t across = (columns + wide - 1) / wide;
    uint32_t wrong = 0;
    for (size_t row = 0; row < rows && !wrong; row++)
        for (size_t block = 0, at = 0; block < across; block++, at += wide) {
            float scale = scales[row / high * across + block];
            size_t count = columns - at < wide ? columns - at : wide;
            const uint16_t *from = bits + row * columns + at;
            uint16_t tiny = 0, least = (uint16_t)((as_bits(scale * 0x1p-6f) >> 16) + 1);
            for (size_t i = 0; i < count; i++)
                tiny |= (uint16_t)((from[i] & 0x7fff) - 1) < least;
            if (tiny)
                fp8_codes(from, count, scale, 1, out + row * columns + at, &wrong);
            else
                fp8_codes(from, count, scale * 0x1p120f, 0, out + row * columns + at, &wrong);
        }
    return !wrong;
}

/* ---- MXFP4: 32 values, two a byte, share a power of two. ---- */

/* table: for every scale and byte the two values of 16 bits */
void mxfp4_decode(const uint8_t *restrict blocks, const uint8_t *restrict scales, size_t groups,
                  const uint32_t *restrict table, uint32_t *restrict out)
{
    for (size_t group = 0; group < groups; group++, blocks += 16, out += 16) {
        const uint32_t *values = table + 256 * (size_t)scales[group];
        for (int i = 0; i < 16; i++)
            out[i] = values[blocks[i]];
    }
}

/* The nibble of a bfloat16; half: the bits of 0.5 under the group's scale, from which the others are 64 apart. */
INLINE uint16_t mxfp4_code(uint16_t bits, uint16_t half, uint16_t *wrong)
{
    uint16_t size = bits & 0x7fff, above = (uint16_t)(size - half), code = above >> 6;
    uint16_t found = size == 0 ? 0 : above == 0 ? 1 : code;
    *wrong |= size == 0 || above == 0 ? 0 : (uint16_t)((above & 63) | (code < 2) | (code > 7));
    return (uint16_t)((found & 7) | (bits >> 12 & 8));
}

/* bfloat16 under given scales of 2 to 252; whether every nibble gives back its number */
WIDE int mxfp4_encode(const uint16_t *bits, const uint8_t *scales, size_t groups, uint8_t *out)
{
    uint16_t wrong = 0, codes[32];
    for (size_t group = 0; group < groups && !wrong; group++, bits += 32, out += 16) {
        uint16_t half = (uint16_t)((scales[group] - 1) << 7);
        for (int i = 0; i < 32; i++)
            codes[i] = mxfp4_code(bits[i], half, &wrong);
        for (int i = 0; i < 16; i++)
            out[i] = (uint8_t)(codes[2 * i] | codes[2 * i + 1] << 4);
    }
    return !wrong;
}

/* ---- INT4: values + 8, two a byte. ---- */

/* units: of 32 values; each: how many of them share a scale; out: two bfloat16 a word */
void int4_decode(const uint8_t *restrict packed, const float *restrict scales, size_t units, size_t each,
                 uint32_t *restrict out)
{
    for (size_t unit = 0; unit < units; unit++, packed += 16, out += 16) {
        float scale = scales[unit / each];
        for (int i = 0; i < 16; i++) {
            uint32_t low = rounded((float)((packed[i] & 15) - 8) * scale);
            uint32_t high = rounded((float)((packed[i] >> 4) - 8) * scale);
            out[i] = low >> 16 | (high & 0xffff0000);
        }
    }
}

/* ---- Transposes. A square goes through memory that stays in the first cache: so every line is read and written once
 * and whole, whatever the strides; N x N of it at a time go through registers, rows perfectly shuffled log2(N) times.
 */

#define SIDE 64

#ifdef __clang__
#define MIX(type, a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define MIX(type, a, b, ...) __builtin_shuffle(a, b, (type){__VA_ARGS__})
#endif

typedef uint16_t v16 __attribute__((vector_size(16)));
typedef uint32_t v32 __attribute__((vector_size(16)));
#define LOW16(a, b) MIX(v16, a, b, 0, 8, 1, 9, 2, 10, 3, 11)
#define HIGH16(a, b) MIX(v16, a, b, 4, 12, 5, 13, 6, 14, 7, 15)
#define LOW32(a, b) MIX(v32, a, b, 0, 4, 1, 5)
#define HIGH32(a, b) MIX(v32, a, b, 2, 6, 3, 7)

typedef struct { /* steps in elements along the rows and columns of a matrix */
    ptrdiff_t to_row, to_column, from_row, from_column;
} steps;

#define TURN(bits, N, ROUNDS)                                                                                         \
    INLINE void corner##bits(uint##bits##_t *to, const uint##bits##_t *from)                                          \
    {                                                                                                                 \
        v##bits rows[N], next[N];                                                                                     \
        for (int i = 0; i < N; i++)                                                                                   \
            memcpy(rows + i, from + i * SIDE, 16);                                                                    \
        for (int round = 0; round < ROUNDS; round++, memcpy(rows, next, sizeof rows))                                 \
            for (int i = 0; i < N / 2; i++) {                                                                         \
                next[2 * i] = LOW##bits(rows[i], rows[i + N / 2]);                                                    \
                next[2 * i + 1] = HIGH##bits(rows[i], rows[i + N / 2]);                                               \
            }                                                                                                         \
        for (int i = 0; i < N; i++)                                                                                   \
            memcpy(to + i * SIDE, rows + i, 16);                                                                      \
    }                                                                                                                 \
                                                                                                                      \
    INLINE void square##bits(uint##bits##_t *restrict to, const uint##bits##_t *restrict from, steps s, size_t high,  \
                             size_t wide)                                                                             \
    {                                                                                                                 \
        uint##bits##_t read[SIDE * SIDE], turned[SIDE * SIDE];                                                        \
        for (size_t column = 0; column < wide; column++)                                                              \
            for (size_t row = 0; row < high; row++)                                                                   \
                read[column * SIDE + row] =                                                                           \
                    from[(ptrdiff_t)row * s.from_row + (ptrdiff_t)column * s.from_column];                            \
        for (size_t column = 0; column < wide; column += N)                                                           \
            for (size_t row = 0; row < high; row += N)                                                                \
                corner##bits(turned + row * SIDE + column, read + column * SIDE + row);                               \
        for (size_t row = 0; row < high; row++)                                                                       \
            for (size_t column = 0; column < wide; column++)                                                          \
                to[(ptrdiff_t)row * s.to_row + (ptrdiff_t)column * s.to_column] = turned[row * SIDE + column];        \
    }                                                                                                                 \
                                                                                                                      \
    /* Constants here become vector loads and stores there: whole squares of a matrix or of every second column. */   \
    INLINE void tile##bits(uint##bits##_t *to, const uint##bits##_t *from, steps s, size_t high, size_t wide)         \
    {                                                                                                                 \
        if (high < SIDE || wide < SIDE)                                                                               \
            square##bits(to, from, s, high, wide);                                                                    \
        else if (s.from_row == 1 && s.to_column == 1)                                                                 \
            square##bits(to, from, (steps){s.to_row, 1, 1, s.from_column}, SIDE, SIDE);                               \
        else if (s.from_row == 2 && s.to_column == 1)                                                                 \
            square##bits(to, from, (steps){s.to_row, 1, 2, s.from_column}, SIDE, SIDE);                               \
        else if (s.from_row == 1 && s.to_column == 2)                                                                 \
            square##bits(to, from, (steps){s.to_row, 2, 1, s.from_column}, SIDE, SIDE);                               \
        else                                                                                                          \
            square##bits(to, from, s, SIDE, SIDE);                                                                    \
    }                                                                                                                 \
                                                                                                                      \
    void turn##bits(uint##bits##_t *to, const uint##bits##_t *from, const steps *s, size_t rows, size_t columns)      \
    {                                                                                                                 \
        for (size_t column = 0; column < columns; column += SIDE)                                                     \
            for (size_t row = 0; row < rows; row += SIDE)                                                             \
                tile##bits(to + (ptrdiff_t)row * s->to_row + (ptrdiff_t)column * s->to_column,                        \
                           from + (ptrdiff_t)row * s->from_row + (ptrdiff_t)column * s->from_column, *s,              \
                           rows - row < SIDE ? rows - row : SIDE, columns - column < SIDE ? columns - column : SIDE); \
    }

TURN(16, 8, 3)
TURN(32, 4, 2)
