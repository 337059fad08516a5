/* Memory that is cut into arrays, one after the other. */
#pragma once

#include <stdint.h>

namespace transom::TRANSOM_LEVEL {
namespace {

/* Hands out arrays that begin at cache lines. An arena without memory hands out NULL and counts, so
 * that one function is both the size of a workspace and its layout. */
class Arena {
 public:
  explicit Arena(void *memory = nullptr) : memory_(static_cast<char *>(memory)) {}

  template <class T>
  T *take(int64_t count) {
    char *start = memory_ == nullptr ? nullptr : memory_ + bytes_;
    /* More than any host has stays more, and is refused there; it must not wrap round to less. */
    constexpr uint64_t kMost = uint64_t{1} << 56;
    const uint64_t bytes = static_cast<uint64_t>(count) <= kMost / sizeof(T)
                               ? static_cast<uint64_t>(count) * sizeof(T)
                               : kMost;
    bytes_ += (bytes + 63) & ~uint64_t{63};
    return reinterpret_cast<T *>(start);
  }

  uint64_t bytes() const { return bytes_; }

 private:
  char *memory_;
  uint64_t bytes_ = 0;
};

/* The bytes that lay_out(arena) takes. */
template <class LayOut>
inline int64_t bytes_of(LayOut lay_out) {
  Arena arena;
  lay_out(arena);
  return static_cast<int64_t>(arena.bytes());
}

}  // namespace
}  // namespace transom::TRANSOM_LEVEL
