/* Reading: the arguments of a call as C sees them, and as the words that its plan depends on. */
#include "extension.h"

#include <cstring>
#include <stdexcept>
#include <utility>

namespace transom_c {

Names names;
Mode mode = {{}, nullptr, 0};

std::shared_ptr<Operator> operator_of(std::string name, const py::list &parameters,
                                      const py::list &host) {
  auto op = std::make_shared<Operator>();
  op->name = std::move(name);
  uint32_t arguments = 0;
  for (const py::handle each : parameters) {
    const py::tuple given = py::reinterpret_borrow<py::tuple>(each);
    op->parameters.push_back(
        {py::cast<std::string>(given[0]), py::cast<int32_t>(given[1]), py::cast<bool>(given[2])});
    arguments += op->parameters.back().kind == kWeight ? 4 : 1;
  }
  if (arguments > kMostArguments) throw py::value_error("too many arguments; expected 48 at most");
  for (const py::handle each : host) op->host.push_back(py::cast<size_t>(each));
  return op;
}

Reading::Reading(const Operator &op, PyObject *const *values, bool lenient)
    : op_(op), lenient_(lenient) {
  std::copy(values, values + op.parameters.size(), values_);
}

bool Reading::read() {
  for (size_t i = 0; i < count(); i++)
    if (!argument(i)) return false;
  if (n_tensors == 0) return false;
  if (device() == kHost) return true;
  for (const size_t i : op_.host) {
    if (values_[i] == Py_None) continue;
    const py::object pinned = owned(PyObject_CallMethodNoArgs(values_[i], names.is_pinned));
    if (!note(pinned.ptr() == Py_True)) return false;
  }
  return true;
}

bool Reading::note(std::string_view text) {
  if (!note(static_cast<int64_t>(text.size()))) return false;
  for (size_t i = 0; i < text.size(); i += 8) {
    int64_t eight = 0;
    std::memcpy(&eight, text.data() + i, text.size() - i < 8 ? text.size() - i : 8);
    if (!note(eight)) return false;
  }
  return true;
}

bool Reading::argument(size_t i) {
  const Parameter &p = op_.parameters[i];
  PyObject *value = values_[i];
  const uint32_t first = n_arguments;
  places_[i] = first;
  if (value == Py_None) {
    if (!p.optional || !none()) return false;
  } else if (p.kind >= 0) {
    /* 0.0 and an absent number are different words. */
    if ((p.optional && !note(1)) || !plain(p, value)) return false;
  } else if (p.kind == kWeight && is_exactly(value, names.quantized)) {
    if (!quantized(p, value)) return false;
  } else if (!tensor(p, value, i)) {
    return false;
  }
  if (p.kind == kWeight)
    while (n_arguments < first + 4) next(TRANSOM_VALUE_NONE);
  return true;
}

bool Reading::quantized(const Parameter &p, PyObject *weight) {
  const py::object buffers = owned(PyObject_GetAttr(weight, names.buffers));
  if (!PyDict_Check(buffers.ptr()) || !note(-2)) return false;
  for (PyObject *name : names.parts) {
    PyObject *part = PyDict_GetItemWithError(buffers.ptr(), name);
    if (part == nullptr || part == Py_None) {
      if (!none()) return false;
    } else if (!tensor(p, keep(py::reinterpret_borrow<py::object>(part)), count())) {
      return false;
    }
  }
  PyObject *spec = keep(owned(PyObject_GetAttr(weight, names.spec)));
  return PyUnicode_CheckExact(spec) && text(next(TRANSOM_VALUE_STRING), spec);
}

/* `i`: the argument that it is, or their count for a part of one. */
bool Reading::tensor(const Parameter &p, PyObject *value, size_t i) {
  if (!is_exactly(value, names.tensor) && !is_exactly(value, names.parameter) &&
      !(lenient_ && PyObject_TypeCheck(value, reinterpret_cast<PyTypeObject *>(names.tensor))))
    return false;
  transom_tensor &t = tensors[n_tensors];
  if (names.exchange->read(value, &t) != 0) {
    PyErr_Clear(); /* one that DLPack does not know, or without memory */
    return false;
  }
  if (t.dtype_code == TRANSOM_FLOAT || t.dtype_code == TRANSOM_BFLOAT) {
    /* A view that negates when read (of a complex tensor's conjugate): C reads memory as it is. */
    if (owned(names.is_neg(value, nullptr)).ptr() == Py_True) {
      value = keep(owned(PyObject_CallMethodNoArgs(value, names.resolve_neg)));
      if (i < count()) values_[i] = value;
      if (names.exchange->read(value, &t) != 0) throw py::error_already_set();
    }
  }
  const int32_t n = t.ndim;
  if (words_ + 3 + 2 * static_cast<size_t>(n) > kMostKey) return false;
  key_[words_++] = static_cast<int64_t>(t.dtype_code) << 32 | t.dtype_bits << 16 | t.dtype_lanes;
  key_[words_++] = static_cast<int64_t>(t.device_type) << 32 | static_cast<uint32_t>(t.device_id);
  key_[words_++] = n;
  uint64_t elements = 1; /* it may wrap where a later size is 0 */
  for (int32_t d = 0; d < n; d++) elements *= static_cast<uint64_t>(key_[words_++] = t.shape[d]);
  for (int32_t d = 0; d < n; d++) key_[words_++] = t.strides[d];
  if (t.data == nullptr && elements != 0 && without_memory_.empty())
    without_memory_ = p.name + " has " + std::to_string(elements);
  if (first_ == nullptr) first_ = value;
  next(TRANSOM_VALUE_TENSOR).tensor = &t;
  n_tensors++;
  return true;
}

bool Reading::plain(const Parameter &p, PyObject *value) {
  transom_value &v = next(p.kind);
  switch (p.kind) {
    case TRANSOM_VALUE_BOOL:
      v.i = value == Py_True;
      return PyBool_Check(value) && note(v.i);
    case TRANSOM_VALUE_INT:
      return integer(value, &v.i) && note(v.i);
    case TRANSOM_VALUE_FLOAT: {
      int64_t whole = 0, bits;
      if (PyFloat_CheckExact(value)) {
        v.f = PyFloat_AS_DOUBLE(value);
      } else if (integer(value, &whole)) {
        v.f = static_cast<double>(whole);
      } else {
        return false;
      }
      std::memcpy(&bits, &v.f, sizeof bits);
      return note(PyFloat_CheckExact(value)) && note(bits);
    }
    case TRANSOM_VALUE_STRING:
      return PyUnicode_CheckExact(value) && text(v, value);
    case TRANSOM_VALUE_INTS:
      return integers(v, value);
    default:
      return false;
  }
}

bool Reading::integer(PyObject *value, int64_t *number) {
  if (!PyLong_CheckExact(value)) return false;
  int overflow = 0;
  *number = PyLong_AsLongLongAndOverflow(value, &overflow);
  return overflow == 0;
}

bool Reading::integers(transom_value &v, PyObject *value) {
  if (!PyTuple_CheckExact(value) && !PyList_CheckExact(value)) return false;
  const Py_ssize_t size = PySequence_Fast_GET_SIZE(value);
  if (size > static_cast<Py_ssize_t>(kMostKey) || !note(size)) return false;
  numbers_.emplace_back(static_cast<size_t>(size) + 1); /* the address of none is not NULL */
  for (Py_ssize_t i = 0; i < size; i++) {
    int64_t &number = numbers_.back()[static_cast<size_t>(i)];
    if (!integer(PySequence_Fast_GET_ITEM(value, i), &number) || !note(number)) return false;
  }
  v.ints = numbers_.back().data();
  v.count = static_cast<uint32_t>(size);
  return true;
}

bool Reading::text(transom_value &v, PyObject *value) {
  Py_ssize_t size = 0;
  v.string = PyUnicode_AsUTF8AndSize(value, &size);
  if (v.string == nullptr) {
    PyErr_Clear();
    return false;
  }
  v.count = static_cast<uint32_t>(size);
  return note(std::string_view(v.string, static_cast<size_t>(size)));
}

bool Reading::none() {
  next(TRANSOM_VALUE_NONE);
  return note(-1);
}

transom_value &Reading::next(int32_t tag) {
  transom_value &v = arguments[n_arguments++];
  v.tag = tag;
  v.count = 0;
  v.i = 0;
  return v;
}

const transom_tensor *Reading::tensor(size_t i) const {
  const transom_value &v = arguments[places_[i]];
  return v.tag == TRANSOM_VALUE_TENSOR ? v.tensor : nullptr;
}

transom_tensor &Reading::more(PyObject *value) {
  transom_tensor &t = tensors[n_tensors];
  if (names.exchange->read(value, &t) != 0) throw py::error_already_set();
  n_tensors++;
  return t;
}

bool holds(PyObject *function) {
  const py::object answer = owned(PyObject_CallNoArgs(function));
  if (answer.ptr() == Py_False || answer.is_none()) return false;
  const int truth = PyObject_IsTrue(answer.ptr());
  if (truth < 0) throw py::error_already_set();
  return truth != 0;
}

// Values ------------------------------------------------------------------------------------------

namespace {

/* Numbers of a tensor that are looked at here: with more, the vectors of NumPy, which the rules use,
 * are faster. */
constexpr int64_t kMostNumbers = 6144;

/* How many integers a contiguous tensor on the host has; -1 if that is not what it is. */
int64_t integers_of(const transom_tensor &t) {
  if (t.device_type != kHost || t.dtype_code != TRANSOM_INT || t.dtype_lanes != 1) return -1;
  if (t.dtype_bits != 64 && t.dtype_bits != 32) return -1;
  int64_t count = 1;
  for (int32_t i = t.ndim; i-- > 0;) {
    if (t.shape[i] != 1 && t.strides[i] != count && count != 0) return -1;
    count *= t.shape[i];
  }
  return count <= kMostNumbers && (count == 0 || t.data != nullptr) ? count : -1;
}

/* visit(pointer to the integers as they are) */
template <class Visit>
bool visit(const transom_tensor &t, Visit visit) {
  return t.dtype_bits == 64 ? visit(static_cast<const int64_t *>(t.data))
                            : visit(static_cast<const int32_t *>(t.data));
}

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

}  // namespace

bool holds(const Range &range, const Reading &reading) {
  const transom_tensor *one = reading.tensor(range.first), *other = reading.tensor(range.second);
  if (one == nullptr) std::swap(one, other);
  if (one == nullptr) return true; /* one that is not given adds nothing */
  const int64_t count = integers_of(*one);
  if (count < 0) return false;
  if (range.first == range.second || other == nullptr)
    return visit(*one, [&](auto *numbers) { return within(numbers, count, range); });
  if (integers_of(*other) != count) return false;
  return visit(*one, [&](auto *numbers) {
    return visit(*other, [&](auto *more) { return within(numbers, more, count, range); });
  });
}

}  // namespace transom_c
