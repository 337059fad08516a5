/* chip.c: mover, matrix unit, vector buffer and counters. */
#include "chip.h"

#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* Counters ----------------------------------------------------------------------------------- */

static counters all;
static uint64_t bursts, tiles, vector; /* of the command that runs */
static int64_t taken;                  /* floats of the vector buffer */

counters count_now(void) { return all; }

void begin_command(void) {
  bursts = tiles = vector = 0;
  taken = 0;
}

static uint64_t larger(uint64_t a, uint64_t b) { return a > b ? a : b; }

void end_command(void) {
  all.commands++;
  all.tiles += tiles;
  all.vector += vector;
  all.cycles += LAUNCH_CYCLES + larger(bursts, larger(tiles * TILE_CYCLES, vector));
}

void count_vector(int64_t elements, int64_t operations) {
  vector += (uint64_t)((elements + LANES - 1) / LANES * operations);
}

static void count_memory(int64_t bytes) {
  all.bytes += (uint64_t)bytes;
  bursts += (uint64_t)((bytes + BURST - 1) / BURST);
}

void count_transfer(uint64_t bytes, bool within) {
  all.commands++;
  if (within) all.bytes += 2 * bytes;
  else all.link_bytes += bytes;
  all.cycles += LAUNCH_CYCLES + (within ? 2 * bytes / BURST : bytes / LINK_BYTES);
}

/* Vector buffer ------------------------------------------------------------------------------ */

static float buffer[VECTOR_BYTES / sizeof(float)];

float *vector_buffer(int64_t floats) {
  float *piece = buffer + taken;
  taken += floats;
  if (taken > (int64_t)(sizeof buffer / sizeof *buffer)) {
    fprintf(stderr, "transom_sim: a kernel took %lld bytes of the vector buffer, which has %d\n",
            (long long)taken * 4, VECTOR_BYTES);
    abort();
  }
  return piece;
}

bool fits(transom_status *status, int64_t bytes, const char *format, ...) {
  if (bytes <= VECTOR_BYTES) return true;
  char what[256];
  va_list args;
  va_start(args, format);
  vsnprintf(what, sizeof what, format, args);
  va_end(args);
  snprintf(status->message, sizeof status->message,
           "%s: %lld bytes on the chip; the vector buffer has %d", what, (long long)bytes,
           VECTOR_BYTES);
  return false;
}

/* Numbers ------------------------------------------------------------------------------------ */

number_type type_of(const transom_tensor *t) {
  if (t->dtype_code == TRANSOM_FLOAT && t->dtype_bits == 32) return F32;
  if (t->dtype_code == TRANSOM_FLOAT && t->dtype_bits == 16) return F16;
  if (t->dtype_code == TRANSOM_BFLOAT && t->dtype_bits == 16) return BF16;
  return UNKNOWN;
}

int64_t size_of(number_type type) { return type == F32 ? 4 : 2; }

static float from_bits(uint32_t bits) {
  float x;
  memcpy(&x, &bits, 4);
  return x;
}

static uint32_t to_bits(float x) {
  uint32_t bits;
  memcpy(&bits, &x, 4);
  return bits;
}

static float widen_f16(uint16_t h) {
  const uint32_t sign = (uint32_t)(h & 0x8000) << 16, exponent = h >> 10 & 31, rest = h & 1023;
  if (exponent == 31) return from_bits(sign | 0x7F800000 | rest << 13);
  if (exponent) return from_bits(sign | (exponent + 112) << 23 | rest << 13);
  const float small = (float)rest * 0x1p-24f;
  return sign ? -small : small;
}

/* To nearest, ties to even, as all stores round. */
static uint16_t round_f16(float x) {
  const uint32_t bits = to_bits(x), sign = bits >> 16 & 0x8000, size = bits & 0x7FFFFFFF;
  if (size > 0x7F800000) return (uint16_t)(sign | 0x7E00);
  if (size >= 0x477FF000) return (uint16_t)(sign | 0x7C00); /* 65520 and more */
  if (size < 0x38800000) { /* below 2**-14: multiples of 2**-24, which is the last place of 0.5 */
    return (uint16_t)(sign | (to_bits(from_bits(size) + 0.5f) - to_bits(0.5f)));
  }
  return (uint16_t)(sign | ((size - 0x38000000 + 0xFFF + (size >> 13 & 1)) >> 13));
}

static uint16_t round_bf16(float x) {
  const uint32_t bits = to_bits(x);
  if ((bits & 0x7FFFFFFF) > 0x7F800000) return (uint16_t)(bits >> 16 | 0x40);
  return (uint16_t)((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
}

static float number(const void *data, number_type type, int64_t i) {
  switch (type) {
    case F16: return widen_f16(((const uint16_t *)data)[i]);
    case BF16: return from_bits((uint32_t)((const uint16_t *)data)[i] << 16);
    default: return ((const float *)data)[i];
  }
}

static void put(void *data, number_type type, int64_t i, float x) {
  switch (type) {
    case F16: ((uint16_t *)data)[i] = round_f16(x); break;
    case BF16: ((uint16_t *)data)[i] = round_bf16(x); break;
    default: ((float *)data)[i] = x;
  }
}

/* Mover -------------------------------------------------------------------------------------- */

matrix on_chip(float *data, int64_t row) {
  return (matrix){.data = data, .row = row, .column = 1, .on_chip = true};
}

matrix transposed(matrix m) {
  matrix t = m;
  t.row = m.column, t.column = m.row;
  return t;
}

matrix at(matrix m, int64_t i, int64_t j) {
  if (m.rows) m.rows += i;
  else m.data = (char *)m.data + i * m.row * size_of(m.type);
  m.data = (char *)m.data + j * m.column * size_of(m.type);
  return m;
}

/* The move of one row: pieces that lie apart take a burst each. */
static void count_row(matrix m, int64_t columns) {
  const int64_t size = size_of(m.type);
  if (m.on_chip || !columns) return;
  if (m.column == 1) {
    count_memory(columns * size);
  } else {
    all.bytes += (uint64_t)(columns * size);
    bursts += (uint64_t)columns;
  }
}

void load_row(float *to, matrix from, int64_t i, int64_t columns) {
  const int64_t row = from.rows ? from.rows[i] : i;
  if (row < 0) {
    memset(to, 0, (size_t)columns * sizeof *to);
    return;
  }
  count_row(from, columns);
  const int64_t start = row * from.row;
  if (from.type == F32 && from.column == 1) {
    memcpy(to, (const float *)from.data + start, (size_t)columns * sizeof *to);
    return;
  }
  for (int64_t j = 0; j < columns; j++)
    to[j] = number(from.data, from.type, start + j * from.column);
}

void store_row(matrix to, int64_t i, const float *from, int64_t columns) {
  const int64_t row = to.rows ? to.rows[i] : i;
  if (row < 0) return;
  count_row(to, columns);
  for (int64_t j = 0; j < columns; j++)
    put(to.data, to.type, row * to.row + j * to.column, from[j]);
}

/* Matrix unit -------------------------------------------------------------------------------- */

static float left[STRIPE][TILE_FLOATS], right[STRIPE][TILE_FLOATS];
static float sums[STRIPE][STRIPE][TILE_FLOATS];

static int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

/* A tile of at most m x n elements from (i, j) on, zero beyond them. A matrix whose columns lie
 * together is moved column by column, so that its bursts are long. */
static void load_tile(float *tile, matrix from, int64_t i, int64_t j, int64_t m, int64_t n) {
  if (from.packed) {
    const int64_t place = (j / TILE * from.row + i / TILE) * TILE_FLOATS;
    const matrix flat = {.data = from.data, .type = from.type, .row = 1, .column = 1};
    load_row(tile, flat, place, TILE_FLOATS);
    return;
  }
  memset(tile, 0, TILE_FLOATS * sizeof *tile);
  from = at(from, i, j);
  if (from.row == 1 && from.column != 1 && !from.rows) {
    float column[TILE];
    for (int64_t c = 0; c < n; c++) {
      load_row(column, transposed(from), c, m);
      for (int64_t r = 0; r < m; r++) tile[r * TILE + c] = column[r];
    }
    return;
  }
  for (int64_t r = 0; r < m; r++) load_row(tile + r * TILE, from, r, n);
}

/* c += a . b */
static void multiply(float *restrict c, const float *restrict a, const float *restrict b) {
  for (int i = 0; i < TILE; i++)
    for (int k = 0; k < TILE; k++)
      for (int j = 0; j < TILE; j++) c[i * TILE + j] += a[i * TILE + k] * b[k * TILE + j];
  tiles++;
}

static void store_sums(matrix c, int64_t i, int64_t j, int64_t m, int64_t n, bool add) {
  float row[STRIPE * TILE];
  for (int64_t r = 0; r < m; r++) {
    for (int64_t x = 0; x < n; x++)
      row[x] = sums[r / TILE][x / TILE][r % TILE * TILE + x % TILE];
    if (!add) {
      store_row(at(c, 0, j), i + r, row, n);
      continue;
    }
    float *into = (float *)c.data + (i + r) * c.row + j;
    for (int64_t x = 0; x < n; x++) into[x] += row[x];
    count_vector(n, 1);
  }
}

void matrix_product(int64_t m, int64_t n, int64_t k, matrix a, matrix b, matrix c, bool add) {
  const int64_t side = STRIPE * TILE;
  for (int64_t i = 0; i < m; i += side) {
    const int64_t height = least(side, m - i);
    for (int64_t j = 0; j < n; j += side) {
      const int64_t width = least(side, n - j);
      for (int64_t y = 0; y * TILE < height; y++)
        for (int64_t x = 0; x * TILE < width; x++) memset(sums[y][x], 0, sizeof sums[y][x]);
      for (int64_t p = 0; p < k; p += TILE) {
        const int64_t depth = least(TILE, k - p);
        for (int64_t t = 0; t * TILE < height; t++)
          load_tile(left[t], a, i + t * TILE, p, least(TILE, height - t * TILE), depth);
        for (int64_t t = 0; t * TILE < width; t++)
          load_tile(right[t], b, p, j + t * TILE, depth, least(TILE, width - t * TILE));
        for (int64_t y = 0; y * TILE < height; y++)
          for (int64_t x = 0; x * TILE < width; x++) multiply(sums[y][x], left[y], right[x]);
      }
      store_sums(c, i, j, height, width, add);
    }
  }
}

static int64_t whole_tiles(int64_t n) { return (n + TILE - 1) / TILE; }

int64_t packed_elements(int64_t k, int64_t n) {
  return whole_tiles(k) * whole_tiles(n) * TILE_FLOATS;
}

matrix packed_matrix(void *data, number_type type, int64_t k) {
  return (matrix){.data = data, .type = type, .row = whole_tiles(k), .packed = true};
}

void pack_matrix(void *to, matrix b, int64_t k, int64_t n) {
  const matrix flat = {.data = to, .type = b.type, .row = TILE_FLOATS, .column = 1};
  float tile[TILE_FLOATS];
  int64_t place = 0;
  for (int64_t j = 0; j < n; j += TILE)
    for (int64_t i = 0; i < k; i += TILE, place++) {
      load_tile(tile, b, i, j, least(TILE, k - i), least(TILE, n - j));
      store_row(flat, place, tile, TILE_FLOATS);
    }
}
