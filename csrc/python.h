/* What the sources of transom._C share: Python's objects, and its tensors as C sees them. */
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <memory>

extern "C" {
#include "transom_plugin.h"
}

namespace transom_c {

namespace py = pybind11;

constexpr uint32_t kMostPlaces = 48; /* of a call's arguments */
constexpr size_t kMostKey = 512;     /* words of a call's shapes and plain arguments */
constexpr int32_t kHost = 1;         /* DLPack's device type of the processor */

enum : int32_t { kTensor = -1, kWeight = -2 }; /* kinds of a parameter; else a plain one's tag */

/* DLPackExchangeAPI of dlpack.h, as far as it is used; it only grows within a major version. The
 * tensor that it writes is DLTensor, which transom_tensor equals field by field. */
struct Exchange {
  uint32_t major, minor;
  const Exchange *previous;
  void *allocate, *from_object, *to_object;
  int (*read)(void *object, transom_tensor *tensor);
};

/* What is asked of Python, looked up once; never freed, since Python may end before this does. */
struct Names {
  const Exchange *exchange;
  PyObject *tensor, *quantized;       /* types */
  PyObject *threads, *deterministic, *written; /* functions of torch */
  PyCFunction is_neg; /* the function of Tensor.is_neg: looking it up takes as long as it does */
  PyObject *resolve_neg, *device, *buffers, *spec;
  PyObject *parts[3]; /* of a quantised weight */
};
extern Names names;

inline py::object owned(PyObject *result) {
  if (result == nullptr) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(result);
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

/* A built-in function that owns `state`. */
template <class State>
py::object built_in(PyMethodDef *definition, std::unique_ptr<State> state) {
  const py::capsule self(state.release(), definition->ml_name, [](PyObject *capsule) {
    delete static_cast<State *>(PyCapsule_GetPointer(capsule, PyCapsule_GetName(capsule)));
  });
  return owned(PyCFunction_New(definition, self.ptr()));
}

template <class State>
State &state_of(PyObject *self, const PyMethodDef &definition) {
  return *static_cast<State *>(PyCapsule_GetPointer(self, definition.ml_name));
}

void add_direct(py::module_ &module); /* direct.cpp */
void add_ranges(py::module_ &module); /* ranges.cpp */

}  // namespace transom_c
