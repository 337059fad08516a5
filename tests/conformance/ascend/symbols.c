// What lowered kernels call on the host: copies between strided buffers, roundings to bfloat16 and
// half, and a heap whose blocks begin poisoned and are all taken back between two programs.

#include <stdint.h>
#include <stdlib.h>
#include <string.h>

typedef struct { int64_t rank; void *descriptor; } any_memref;
typedef struct { char *base, *data; int64_t offset, sizes_then_strides[]; } memref;

void memrefCopy(int64_t size, const any_memref *from, const any_memref *to) {
  const memref *a = from->descriptor, *b = to->descriptor;
  const int64_t rank = from->rank, *sizes = a->sizes_then_strides;
  for (int64_t d = 0; d < rank; ++d)
    if (sizes[d] == 0) return;
  int64_t at[16] = {0};
  for (;;) {
    int64_t in = a->offset, out = b->offset, d = rank - 1;
    for (int64_t e = 0; e < rank; ++e) {
      in += at[e] * a->sizes_then_strides[rank + e];
      out += at[e] * b->sizes_then_strides[rank + e];
    }
    memcpy(b->data + out * size, a->data + in * size, size);
    while (d >= 0 && ++at[d] == sizes[d]) at[d--] = 0;
    if (d < 0) return;
  }
}

// The compiler's runtime returns the 16 bits in a vector register; so does a float's low half.
float __truncsfbf2(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  if ((bits & 0x7fffffff) > 0x7f800000)
    bits = (bits >> 16) | 0x40;  // NaN stays NaN
  else
    bits = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  memcpy(&value, &bits, sizeof value);
  return value;
}

float __truncdfbf2(double value) { return __truncsfbf2((float)value); }

typedef struct block { struct block *next; void *filler; } block;  // 16 bytes, as malloc aligns
static block *blocks;

void *transom_allocate(size_t size) {
  block *made = malloc(sizeof(block) + size + 64);
  if (made == NULL) abort();
  made->next = blocks;
  blocks = made;
  return memset(made + 1, 0xff, size + 64);
}

void transom_release(void *memory) { (void)memory; }

void transom_forget(void) {
  while (blocks != NULL) {
    block *next = blocks->next;
    free(blocks);
    blocks = next;
  }
}
