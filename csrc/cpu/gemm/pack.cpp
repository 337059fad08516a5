/* The plugin's service that writes a weight in panels (weight_panels.h), for the operators whose
 * products read it so. */
#include "weight_panels.h"

namespace transom::TRANSOM_LEVEL {
namespace {

/* True if Fp8Panels::decode() gives every number of the matrix. */
inline bool decodes(const QuantizedMatrix &w, int64_t N) {
  const int64_t rows = w.block_rows == 0 ? N : w.block_rows;
  const int64_t columns = w.block_columns == 0 ? w.columns : w.block_columns;
  for (int64_t n = 0; n < N; n += rows)
    for (int64_t k = 0; k < w.columns; k += columns)
      if (const float scale = w.scale(n, k); !(scale < 0x1p100f && scale > -0x1p100f))
        return false;
  for (int64_t n = 0; n < N; n++) {
    uint8_t largest = 0;
    for (int64_t k = 0; k < w.columns; k++) {
      const uint8_t magnitude = w.values[n * w.row + k] & 0x7f;
      largest = magnitude > largest ? magnitude : largest;
    }
    if (largest == 0x7f) return false;
  }
  return true;
}

template <class Format>
inline void write_matrix(const Weight &w, int64_t N, int64_t K, char *to) {
  typedef typename Format::Unit Unit;
  const bool plain = w.kind >= 0;
  const Unit *from = reinterpret_cast<const Unit *>(
      plain ? w.plain.data : reinterpret_cast<const char *>(w.quantized.values));
  const int64_t row = plain ? w.plain.row : w.quantized.row, along = plain ? w.plain.along : 1;
  const int64_t bytes = panel_bytes<Format>(K);
  constexpr int64_t kSteps = Format::kSteps;
  memset(to, 0, static_cast<size_t>(matrix_bytes<Format>(N, K)));
  for (int64_t n = 0; n < N; n += kPanel, to += bytes)
    for (int64_t k = 0; k < K; k += kLine) /* what is written meanwhile stays in L1 */
      for (int64_t i = 0; i < min_of(kPanel, N - n); i++) {
        const Unit *next = from + (n + i) * row + k * along;
        Unit *at = reinterpret_cast<Unit *>(to) + k * kPanel + i * kSteps;
        const int64_t length = min_of(kLine, K - k);
        int64_t j = 0;
        for (; j + kSteps <= length; j += kSteps, at += kSteps * kPanel)
#pragma GCC unroll 4
          for (int s = 0; s < kSteps; s++, next += along) at[s] = *next;
        for (int s = 0; j < length; j++, s++, next += along) at[s] = *next;
      }
}

uint64_t panels_bytes(const transom_value *weight) {
  const transom_tensor *values = weight[0].tensor;
  const Weight w = weight_in(weight, 0);
  const int64_t E = values->shape[0], N = values->shape[1], K = depth(w, values);
  int64_t bytes = 0;
  if (E > 0 && N > 0 && K > 0)
    with_panels_of(w, [&]<class Format>(Format) {
      bytes = flag_bytes(E) + E * matrix_bytes<Format>(N, K);
    });
  return static_cast<uint64_t>(bytes);
}

void write_panels(const transom_value *weight, void *panels) {
  const transom_tensor *values = weight[0].tensor;
  const int64_t E = values->shape[0], N = values->shape[1];
  char *flags = static_cast<char *>(panels), *to = flags + flag_bytes(E);
  memset(flags, 0, static_cast<size_t>(flag_bytes(E)));
  for (int64_t e = 0; e < E; e++) {
    const Weight w = weight_in(weight, e);
    const int64_t K = depth(w, values);
    flags[e] = w.kind >= 0 || decodes(w.quantized, N);
    with_panels_of(w, [&]<class Format>(Format) {
      write_matrix<Format>(w, N, K, to);
      to += matrix_bytes<Format>(N, K);
    });
  }
}

uint64_t packed_bytes(const transom_impl *impl, uint32_t, const transom_value *weight) {
  const bool wanted =
      strcmp(impl->op, "moe_experts") == 0 || strcmp(impl->op, "grouped_gemm") == 0;
  return wanted ? panels_bytes(weight) : 0;
}

int32_t pack(const transom_impl *, uint32_t, const transom_value *weight, void *packed, void *,
             transom_status *) {
  write_panels(weight, packed);
  return 0;
}

}  // namespace

extern const transom_services services = {
    sizeof(transom_services), 0, nullptr, nullptr, nullptr, nullptr, nullptr, packed_bytes, pack};

}  // namespace transom::TRANSOM_LEVEL
