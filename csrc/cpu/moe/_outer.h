/* Sums of outer products over rows: the gradients in weights. */
#pragma once

#include "../gemm/panels.h"
#include "_tasks.h"

namespace transom::TRANSOM_LEVEL {
namespace {

/* Rows whose outer products are summed before they are added: one chunk of multiply_panel(). */
constexpr int64_t kOuterRows = kDepth;
/* The most rows and columns of a block of the gradient. */
constexpr int64_t kOuterHeight = 128, kOuterWidth = 256;

/* The workspace of a thread; a few rows of padding keep columns off the same cache sets. */
struct OuterSpace {
  float transposed[kOuterHeight * (kOuterRows + kPad)];
  float left[kOuterRows * (kOuterHeight + kPad)];
  float right[kOuterRows * (kOuterWidth + kPad)];
  float sums[kOuterHeight * (kOuterWidth + kPanel)];
};

/* space->sums[i][j] = sum over rows r, in order, of left(r)[i] * right(r)[j] for a block of the
 * gradient; with `more` it is added. left(r, to) and right(r, to) write the block's part of a row as
 * float32. */
template <class Left, class Right>
inline void sum_outer(int64_t rows, int64_t height, int64_t width, Left left, Right right,
                      OuterSpace *space, bool more) {
  constexpr int64_t kLeft = kOuterHeight + kPad, kRight = kOuterWidth + kPad;
  constexpr int64_t kTransposedStride = kOuterRows + kPad;
  for (int64_t first = 0; first < rows; first += kOuterRows) {
    const int64_t here = min_of(kOuterRows, rows - first);
    for (int64_t r = 0; r < here; r++) {
      left(first + r, space->left + r * kLeft);
      right(first + r, space->right + r * kRight);
    }
    for (int64_t r = here; r < up_to(here, kWidth); r++)
      memset(space->left + r * kLeft, 0, kLeft * sizeof(float));
    for (int64_t r = 0; r < here; r += kWidth)
      for (int64_t i = 0; i < height; i += 4) {
        vf four[4];
        transpose(space->left + r * kLeft + i, kLeft, four);
        for (int64_t j = 0; j < 4; j++)
          store(space->transposed + (i + j) * kTransposedStride + r, four[j]);
      }
    const Numbers<float> rights = {space->right, 1, kRight};
    multiply_panels(rights, height, here, space->transposed, kTransposedStride, 0, width, space->sums,
                    kOuterWidth + kPanel, int64_t{1} << 30, more || first > 0);
  }
  if (rows == 0 && !more) memset(space->sums, 0, sizeof space->sums);
}

}  // namespace
}  // namespace transom::TRANSOM_LEVEL
