/* Checks of values: whether the integers of a call's tensors are within the ranges that its operator
 * declares (runtime/abi/ranges.py).
 *
 * ranges() makes a built-in function of all declared arguments. Where every range holds, the rule in
 * Python, which would find the same, need not be asked; where one does not, or cannot be read here,
 * the rule decides and says what is wrong. */
#include "python.h"

#include <memory>
#include <utility>
#include <vector>

namespace transom_c {
namespace {

/* Numbers of a tensor that are looked at here: with more, the vectors of NumPy, which the rules use,
 * are faster. */
constexpr int64_t kMostNumbers = 6144;

/* low <= first (+ second, element by element) <= high, in order one never less than the one before
 * if it rises. */
struct Range {
  size_t first, second; /* arguments; the same one: it stands alone */
  bool rises;
  int64_t low, high;
};

struct Ranges {
  std::vector<Range> all;
  size_t count; /* of arguments */
  py::object otherwise;
};

/* The integers of a tensor that is contiguous and on the host. */
class Integers {
 public:
  /* False if that is not what `value` is. */
  bool read(PyObject *value) {
    transom_tensor t;
    if (!Py_IS_TYPE(value, reinterpret_cast<PyTypeObject *>(names.tensor))) return false;
    if (names.exchange->read(value, &t) != 0) {
      PyErr_Clear();
      return false;
    }
    if (t.device_type != kHost || t.dtype_code != TRANSOM_INT || t.dtype_lanes != 1) return false;
    if (t.dtype_bits != 64 && t.dtype_bits != 32) return false;
    wide_ = t.dtype_bits == 64;
    data_ = static_cast<const char *>(t.data);
    count_ = 1;
    for (int32_t i = t.ndim; i-- > 0;) {
      if (t.shape[i] != 1 && t.strides[i] != count_ && count_ != 0) return false;
      count_ *= t.shape[i];
    }
    return count_ <= kMostNumbers && (count_ == 0 || data_ != nullptr);
  }
  int64_t count() const { return count_; }

  /* visit(pointer to the integers as they are) */
  template <class Visit>
  bool visit(Visit visit) const {
    return wide_ ? visit(reinterpret_cast<const int64_t *>(data_))
                 : visit(reinterpret_cast<const int32_t *>(data_));
  }

 private:
  const char *data_ = nullptr;
  int64_t count_ = 0;
  bool wide_ = false;
};

template <class Integer>
bool within(const Integer *numbers, int64_t count, const Range &range) {
  bool outside = false;
  for (int64_t i = 0; i < count; i++)
    outside |= (numbers[i] < range.low) | (numbers[i] > range.high);
  if (range.rises)
    for (int64_t i = 1; i < count; i++) outside |= numbers[i] < numbers[i - 1];
  return !outside;
}

template <class First, class Second>
bool within(const First *first, const Second *second, int64_t count, const Range &range) {
  bool outside = false;
  int64_t before = range.low;
  for (int64_t i = 0; i < count; i++) {
    int64_t sum;
    outside |= __builtin_add_overflow(first[i], second[i], &sum);
    outside |= (sum < before) | (sum > range.high);
    if (range.rises) before = sum;
  }
  return !outside;
}

bool holds(const Range &range, PyObject *const *values) {
  Integers one, other;
  PyObject *first = values[range.first], *second = values[range.second];
  if (first == Py_None) std::swap(first, second);
  if (first == Py_None) return true; /* one that is not given adds nothing */
  if (!one.read(first)) return false;
  if (range.first == range.second || second == Py_None)
    return one.visit([&](auto *numbers) { return within(numbers, one.count(), range); });
  if (!other.read(second) || other.count() != one.count()) return false;
  return one.visit([&](auto *numbers) {
    return other.visit([&](auto *more) { return within(numbers, more, one.count(), range); });
  });
}

extern PyMethodDef definition;

PyObject *enter(PyObject *self, PyObject *const *values, Py_ssize_t count) {
  try {
    const Ranges &ranges = state_of<Ranges>(self, definition);
    bool all = static_cast<size_t>(count) == ranges.count;
    for (size_t i = 0; all && i < ranges.all.size(); i++) all = holds(ranges.all[i], values);
    if (all) Py_RETURN_NONE;
    return PyObject_Vectorcall(ranges.otherwise.ptr(), values, static_cast<size_t>(count), nullptr);
  } catch (...) {
    raise_in_python();
  }
  return nullptr;
}

PyMethodDef definition = defined(
    "ranges", enter,
    "A check of the values of a call, with every declared argument in order.");

/* `given`: for each range (first argument, second, whether it rises, low, high). */
py::object ranges(const py::list &given, size_t count, py::object otherwise) {
  auto made = std::make_unique<Ranges>();
  for (const py::handle each : given) {
    const py::tuple one = py::reinterpret_borrow<py::tuple>(each);
    made->all.push_back({py::cast<size_t>(one[0]), py::cast<size_t>(one[1]),
                         py::cast<bool>(one[2]), py::cast<int64_t>(one[3]),
                         py::cast<int64_t>(one[4])});
    if (made->all.back().first >= count || made->all.back().second >= count)
      throw py::value_error("a range of an argument that there is not");
  }
  made->count = count;
  made->otherwise = std::move(otherwise);
  return built_in(&definition, std::move(made));
}

}  // namespace

void add_ranges(py::module_ &module) { module.def("ranges", &ranges); }

}  // namespace transom_c
