/* What the sources of transom._C share: Python's objects, its tensors as C sees them, and the reading
 * of a call's arguments. */
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

extern "C" {
#include "transom_plugin.h"
}

namespace transom_c {

namespace py = pybind11;

constexpr uint32_t kMostArguments = 48; /* of a call, a weight counted as four */
constexpr uint32_t kMostOutputs = 16;
constexpr size_t kMostKey = 512; /* words of a call's shapes and plain arguments */
constexpr int32_t kHost = 1;     /* DLPack's device type of the processor */

enum : int32_t { kTensor = -1, kWeight = -2 }; /* kinds of a parameter; else a plain one's tag */

/* DLPackExchangeAPI of dlpack.h, as far as it is used; it only grows within a major version. The
 * tensor that it writes is DLTensor, which transom_tensor equals field by field. */
struct Exchange {
  uint32_t major, minor;
  const Exchange *previous;
  void *allocate, *from_object, *to_object;
  int (*read)(void *object, transom_tensor *tensor);
};

/* What is asked of Python and torch, looked up once; never freed, since Python may end before this
 * does. */
struct Names {
  const Exchange *exchange;
  PyCFunction is_neg; /* the function of Tensor.is_neg: looking it up takes as long as it does */
  /* Types. */
  PyObject *tensor, *parameter, *quantized;
  /* Functions of torch, each of them in C. */
  PyObject *threads, *deterministic, *written;
  PyObject *grad_enabled, *dispatch_modes, *function_modes, *transforms, *tracing, *profiling;
  PyObject *any_autocast, *autocast; /* of any device; of one */
  PyObject *capturing;               /* by a stream of CUDA or ROCm */
  /* Texts. */
  PyObject *resolve_neg, *device, *type, *cpu, *requires_grad, *is_pinned, *buffers, *spec;
  PyObject *parts[3]; /* of a quantised weight */
};
extern Names names;

/* What Python says of all calls, by setters. */
struct Mode {
  std::string choice;    /* what use() asks for; empty outside of it */
  PyObject *recorded;    /* (plan, values) -> result while record() listens, else nullptr */
  uint64_t workspace;    /* bytes that temporaries should keep to */
};
extern Mode mode;

inline py::object owned(PyObject *result) {
  if (result == nullptr) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(result);
}

inline py::object called(PyObject *function, PyObject *const *values, size_t count) {
  return owned(PyObject_Vectorcall(function, values, count, nullptr));
}

inline bool is_exactly(PyObject *value, PyObject *type) {
  return Py_IS_TYPE(value, reinterpret_cast<PyTypeObject *>(type));
}

/* Sets Python's error from the exception in flight. */
inline void raise_in_python() {
  try {
    throw;
  } catch (py::error_already_set &error) {
    error.restore();
  } catch (const py::builtin_exception &error) {
    error.set_error();
  } catch (const std::bad_alloc &) {
    PyErr_NoMemory();
  } catch (const std::exception &error) {
    PyErr_SetString(PyExc_RuntimeError, error.what());
  }
}

typedef PyObject *Enter(PyObject *self, PyObject *const *values, Py_ssize_t count);

/* What a built-in function is called, and its documentation; `enter` finds what it was made with by
 * state_of(). */
inline PyMethodDef defined(const char *name, Enter *enter, const char *text) {
  return {name, reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(enter)), METH_FASTCALL,
          text};
}

/* A built-in function that shares `state`. */
template <class State>
py::object built_in(PyMethodDef *definition, std::shared_ptr<State> state) {
  auto held = std::make_unique<std::shared_ptr<State>>(std::move(state));
  const py::capsule self(held.release(), definition->ml_name, [](PyObject *capsule) {
    delete static_cast<std::shared_ptr<State> *>(
        PyCapsule_GetPointer(capsule, PyCapsule_GetName(capsule)));
  });
  return owned(PyCFunction_New(definition, self.ptr()));
}

template <class State>
const std::shared_ptr<State> &state_of(PyObject *self, const PyMethodDef &definition) {
  return *static_cast<std::shared_ptr<State> *>(PyCapsule_GetPointer(self, definition.ml_name));
}

struct Parameter {
  std::string name;
  int32_t kind;
  bool optional;
};

struct Operator {
  std::string name;
  std::vector<Parameter> parameters;
  std::vector<size_t> host;   /* arguments that may lie in host memory beside those of a device */
};

std::shared_ptr<Operator> operator_of(std::string name, const py::list &parameters,
                                      const py::list &host);

/* The arguments of one call, read once: as C sees them, and as the words that its plan depends on.
 * Its arrays are on the stack and written only as far as they are used. */
class Reading {
 public:
  /* `lenient`: subclasses of tensors are read as the tensors that they are. */
  Reading(const Operator &op, PyObject *const *values, bool lenient);
  Reading(const Reading &) = delete;
  Reading &operator=(const Reading &) = delete;

  /* False if an argument is none that is read here: of another type, without memory, or larger than
   * a number of C's. It is nobody's fault yet: Python looks at it again. */
  bool read();

  /* Adds to the key; false if that is full. */
  bool note(int64_t number) {
    if (words_ == kMostKey) return false;
    key_[words_++] = number;
    return true;
  }
  bool note(std::string_view text);

  const Operator &op() const { return op_; }
  std::string_view key() const { return {reinterpret_cast<const char *>(key_), 8 * words_}; }
  PyObject *const *values() const { return values_; }
  size_t count() const { return op_.parameters.size(); }
  PyObject *first() const { return first_; } /* tensor among them */
  int32_t device() const { return tensors[0].device_type; }
  /* "x has 6": of the first argument with elements and without memory; else empty. */
  const std::string &without_memory() const { return without_memory_; }

  /* The tensor that stands in argument i, or nullptr: not given, or a quantised weight. */
  const transom_tensor *tensor(size_t i) const;
  /* Reads one more tensor, which is no argument. */
  transom_tensor &more(PyObject *value);
  /* Keeps something alive as long as this. */
  PyObject *keep(py::object held) {
    held_.push_back(std::move(held));
    return held_.back().ptr();
  }

  transom_value arguments[kMostArguments];
  transom_tensor tensors[kMostArguments + kMostOutputs + 1];
  uint32_t n_arguments = 0, n_tensors = 0;

 private:
  bool argument(size_t i);
  bool tensor(const Parameter &p, PyObject *value, size_t i);
  bool quantized(const Parameter &p, PyObject *weight);
  bool plain(const Parameter &p, PyObject *value);
  bool integer(PyObject *value, int64_t *number);
  bool integers(transom_value &v, PyObject *value);
  bool text(transom_value &v, PyObject *value);
  bool none();
  transom_value &next(int32_t tag);

  const Operator &op_;
  const bool lenient_;
  PyObject *values_[kMostArguments];
  uint32_t places_[kMostArguments]; /* of argument i among `arguments` */
  PyObject *first_ = nullptr;
  std::string without_memory_;
  size_t words_ = 0;
  std::vector<py::object> held_;
  std::vector<std::vector<int64_t>> numbers_;
  int64_t key_[kMostKey];
};

/* low <= first (+ second, element by element) <= high, in order one never less than the one before
 * if it rises; runtime/ranges.py. */
struct Range {
  size_t first, second; /* arguments; the same one: it stands alone */
  bool rises;
  int64_t low, high;
};

/* Whether the integers of a call's tensors are certainly within the range. */
bool holds(const Range &range, const Reading &reading);

/* A function of torch without arguments: whether it answers anything but False, 0 and None. */
bool holds(PyObject *function);


}  // namespace transom_c
