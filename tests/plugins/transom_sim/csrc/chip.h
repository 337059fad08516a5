/* chip.h: the chip that the kernels program.
 *
 *   memory --mover--> vector buffer --+--> left, right --matrix unit--> sums
 *      \________________________________/                                |
 *   memory <--mover--------------------------------------------------- <-+
 *
 * On the chip all numbers are float32; the mover widens what it loads and rounds what it stores.
 * Cost: a command takes LAUNCH_CYCLES, and then as long as its busiest unit (they overlap):
 *   mover        a burst of BURST bytes a cycle; a shorter piece takes a whole burst
 *   matrix unit  TILE_CYCLES for each product of two tiles of TILE x TILE
 *   vector unit  LANES elements of one operation a cycle
 * Transfers between host and device pass a link of LINK_BYTES a cycle. */
#ifndef SIM_CHIP_H
#define SIM_CHIP_H

#include <stdbool.h>
#include <stdint.h>

#include "transom_ops.h"

#define TILE 16
#define TILE_CYCLES 16
#define LANES 64
#define BURST 64
#define LINK_BYTES 16
#define LAUNCH_CYCLES 500
#define HERTZ 1e9
#define PEAK_FLOPS (2.0 * TILE * TILE * TILE / TILE_CYCLES * HERTZ)
#define PEAK_BYTES (BURST * HERTZ)

#define VECTOR_BYTES (192 << 10)
#define STRIPE 8 /* tiles of a side: left and right hold that many, sums their square */
#define TILE_FLOATS (TILE * TILE)

typedef struct {
  uint64_t commands, bytes, tiles, vector, link_bytes, cycles;
} counters;

counters count_now(void);
void begin_command(void);
void end_command(void);
void count_vector(int64_t elements, int64_t operations);
void count_transfer(uint64_t bytes, bool within);

/* The vector buffer: handed out piece by piece within a kernel, whole again at its end. A kernel's
 * supports() has asked fits() about the sum; running out nevertheless ends the process. */
float *vector_buffer(int64_t floats);
bool fits(transom_status *, int64_t bytes, const char *format, ...)
    __attribute__((format(printf, 3, 4)));

/* dtypes that the mover converts. */
typedef enum { F32, F16, BF16, UNKNOWN } number_type;
number_type type_of(const transom_tensor *);
int64_t size_of(number_type);

/* A matrix in memory (of `type`) or on the chip: element (i, j) lies at i * row + j * column, in
 * elements. */
typedef struct {
  void *data;
  number_type type;
  int64_t row, column;
  const int64_t *rows; /* row i is rows[i]; negative: zeros. NULL: i itself */
  bool packed;         /* tiles, column of tiles after column, `row` tiles in each */
  bool on_chip;
} matrix;

matrix on_chip(float *data, int64_t row);
matrix transposed(matrix);
matrix at(matrix, int64_t i, int64_t j); /* the part that begins there */

/* The mover: `columns` elements of row i between memory and the chip. */
void load_row(float *to, matrix from, int64_t i, int64_t columns);
void store_row(matrix to, int64_t i, const float *from, int64_t columns);

/* c[m,n] = a[m,k] . b[k,n], or added to c, which then lies on the chip: stripes of tiles through
 * left, right and sums. Each element is summed over k in order, whatever lies around it. */
void matrix_product(int64_t m, int64_t n, int64_t k, matrix a, matrix b, matrix c, bool add);

/* b in the matrix unit's own layout: tiles of 16 x 16, zero beyond the edges. */
int64_t packed_elements(int64_t k, int64_t n);
void pack_matrix(void *to, matrix b, int64_t k, int64_t n);
matrix packed_matrix(void *data, number_type, int64_t k);

#endif
