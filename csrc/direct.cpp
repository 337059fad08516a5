/* The direct path of an operator's calls: eager inference on ordinary tensors.
 *
 * direct() makes a built-in function of one operator. A call of it makes sure that nothing in torch
 * wants to see the call (modes, transforms, autocast, tracing, a gradient), reads the facts that a
 * plan depends on as C sees them, looks the plan up in the operator's own table and runs it. Plans
 * are made in Python, and whatever is out of the ordinary goes there: runtime/abi/direct.py. */
#include "python.h"

#include <cstring>
#include <memory>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

namespace transom_c {
namespace {

constexpr int32_t kCuda = 2, kCudaManaged = 13, kRocm = 10; /* DLPack's device types */

/* What torch is asked before every call, each a function in C, and names. */
struct State {
  PyObject *parameter; /* type */
  PyObject *grad_enabled, *dispatch_modes, *function_modes, *transforms, *tracing;
  PyObject *any_autocast, *autocast; /* of any device; of one */
  PyObject *capturing; /* by a stream of CUDA or ROCm */
  PyObject *requires_grad, *type, *cpu, *choice, *check, *run;
} state;

struct Parameter {
  int32_t kind;
  bool optional;
};

struct Direct {
  std::vector<Parameter> parameters;
  py::dict plans, selection;
  py::list recorders;
  py::object plan_of, otherwise;
};

/* A function of torch without arguments: whether it answers anything but False, 0 and None. */
bool holds(PyObject *function) {
  const py::object answer = owned(PyObject_CallNoArgs(function));
  if (answer.ptr() == Py_False || answer.is_none()) return false;
  const int truth = PyObject_IsTrue(answer.ptr());
  if (truth < 0) throw py::error_already_set();
  return truth != 0;
}

/* What a plan depends on, in words: of each tensor what describes it, of each value itself. */
class Key {
 public:
  bool add(const Parameter &p, PyObject *value) {
    if (value == Py_None) return p.optional && note(-1);
    if (p.kind >= 0) return (!p.optional || note(1)) && plain(p.kind, value);
    if (p.kind == kWeight && is(value, names.quantized)) return quantized(value);
    if (!is(value, names.tensor) && !is(value, state.parameter)) return false;
    if (first_ == nullptr) first_ = value;
    return tensor(value);
  }
  bool note(int64_t number) {
    if (words_ == kMostKey) return false;
    key_[words_++] = number;
    return true;
  }
  py::object bytes() const {
    const char *data = reinterpret_cast<const char *>(key_);
    return owned(PyBytes_FromStringAndSize(data, static_cast<Py_ssize_t>(8 * words_)));
  }
  PyObject *first() const { return first_; } /* tensor */
  int32_t device() const { return device_; } /* its kind of device */

 private:
  static bool is(PyObject *value, PyObject *type) {
    return Py_IS_TYPE(value, reinterpret_cast<PyTypeObject *>(type));
  }

  bool tensor(PyObject *value) {
    transom_tensor t;
    if (names.exchange->read(value, &t) != 0) {
      PyErr_Clear(); /* one that DLPack does not know, or without memory */
      return false;
    }
    const int32_t n = t.ndim;
    if (device_ == 0) device_ = t.device_type;
    if (words_ + 3 + 2 * static_cast<size_t>(n) > kMostKey) return false;
    key_[words_++] = static_cast<int64_t>(t.dtype_code) << 32 | t.dtype_bits << 16 | t.dtype_lanes;
    key_[words_++] = static_cast<int64_t>(t.device_type) << 32 | static_cast<uint32_t>(t.device_id);
    key_[words_++] = n;
    bool elements = true;
    for (int32_t i = 0; i < n; i++) elements &= (key_[words_++] = t.shape[i]) != 0;
    for (int32_t i = 0; i < n; i++) key_[words_++] = t.strides[i];
    /* Elements without memory: a zero tensor, which the dispatcher writes out, or a storage that was
     * resized, which it refuses. */
    return !elements || t.data != nullptr;
  }

  bool quantized(PyObject *weight) {
    const py::object buffers = owned(PyObject_GetAttr(weight, names.buffers));
    if (!PyDict_Check(buffers.ptr()) || !note(-2)) return false;
    for (PyObject *name : names.parts) {
      PyObject *part = PyDict_GetItemWithError(buffers.ptr(), name);
      if (part == nullptr || part == Py_None) {
        if (!note(-1)) return false;
      } else {
        if (first_ == nullptr) first_ = part;
        if (!is(part, names.tensor) || !tensor(part)) return false;
      }
    }
    const py::object spec = owned(PyObject_GetAttr(weight, names.spec));
    return PyUnicode_CheckExact(spec.ptr()) && text(spec.ptr());
  }

  bool plain(int32_t kind, PyObject *value) {
    switch (kind) {
      case TRANSOM_VALUE_BOOL:
        return PyBool_Check(value) && note(value == Py_True);
      case TRANSOM_VALUE_INT:
        return integer(value);
      case TRANSOM_VALUE_FLOAT:
        if (PyFloat_CheckExact(value)) {
          const double number = PyFloat_AS_DOUBLE(value);
          int64_t bits;
          std::memcpy(&bits, &number, sizeof bits);
          return note(0) && note(bits);
        }
        return note(1) && integer(value);
      case TRANSOM_VALUE_STRING:
        return PyUnicode_CheckExact(value) && text(value);
      case TRANSOM_VALUE_INTS:
        return integers(value);
      default:
        return false;
    }
  }

  bool integer(PyObject *value) {
    if (!PyLong_CheckExact(value)) return false;
    int overflow = 0;
    const int64_t number = PyLong_AsLongLongAndOverflow(value, &overflow);
    return overflow == 0 && note(number);
  }

  bool integers(PyObject *value) {
    if (!PyTuple_CheckExact(value) && !PyList_CheckExact(value)) return false;
    const Py_ssize_t size = PySequence_Fast_GET_SIZE(value);
    if (!note(size)) return false;
    for (Py_ssize_t i = 0; i < size; i++)
      if (!integer(PySequence_Fast_GET_ITEM(value, i))) return false;
    return true;
  }

  bool text(PyObject *value) {
    Py_ssize_t size = 0;
    const char *data = PyUnicode_AsUTF8AndSize(value, &size);
    if (data == nullptr) {
      PyErr_Clear();
      return false;
    }
    if (!note(size)) return false;
    for (Py_ssize_t i = 0; i < size; i += 8) {
      int64_t eight = 0;
      std::memcpy(&eight, data + i, static_cast<size_t>(size - i < 8 ? size - i : 8));
      if (!note(eight)) return false;
    }
    return true;
  }

  size_t words_ = 0;
  PyObject *first_ = nullptr;
  int32_t device_ = 0;
  int64_t key_[kMostKey];
};

/* Whether the call, of these values, may go past torch's dispatcher. */
bool ordinary(const Key &key, PyObject *const *values, size_t count) {
  /* First of all: with a mode in force even the questions below are answered by it. */
  if (holds(state.dispatch_modes) || holds(state.function_modes) || holds(state.transforms) ||
      holds(state.tracing))
    return false;
  if (holds(state.grad_enabled)) {
    for (size_t i = 0; i < count; i++) {
      if (!Py_IS_TYPE(values[i], reinterpret_cast<PyTypeObject *>(names.tensor)) &&
          !Py_IS_TYPE(values[i], reinterpret_cast<PyTypeObject *>(state.parameter)))
        continue;
      const py::object wants = owned(PyObject_GetAttr(values[i], state.requires_grad));
      if (wants.ptr() == Py_True) return false;
    }
  }
  py::object type;
  if (key.device() != kHost) {
    const py::object device = owned(PyObject_GetAttr(key.first(), names.device));
    type = owned(PyObject_GetAttr(device.ptr(), state.type));
  }
  PyObject *which = key.device() == kHost ? state.cpu : type.ptr();
  /* Asking for one device takes four times as long; `any` counts the processor in every torch. */
  const bool casts = key.device() != kHost || holds(state.any_autocast);
  if (casts && owned(PyObject_CallOneArg(state.autocast, which)).ptr() == Py_True) return false;
  const bool captures =
      key.device() == kCuda || key.device() == kCudaManaged || key.device() == kRocm;
  return !captures || !holds(state.capturing);
}

py::tuple all(PyObject *const *values, size_t count) {
  py::tuple tuple(count);
  for (size_t i = 0; i < count; i++) tuple[i] = py::handle(values[i]);
  return tuple;
}

py::object call(PyObject *function, PyObject *const *values, size_t count) {
  return owned(PyObject_Vectorcall(function, values, count, nullptr));
}

py::object run(const Direct &direct, PyObject *const *values, size_t count) {
  const auto otherwise = [&] { return call(direct.otherwise.ptr(), values, count); };
  if (count != direct.parameters.size() || PyList_GET_SIZE(direct.recorders.ptr()) != 0)
    return otherwise();
  Key key;
  for (size_t i = 0; i < count; i++)
    if (!key.add(direct.parameters[i], values[i])) return otherwise();
  if (key.first() == nullptr || !key.note(holds(names.deterministic)) ||
      !ordinary(key, values, count))
    return otherwise();

  /* What use() asks for is part of the key; outside of it that is None. */
  PyObject *choice = PyDict_GetItemWithError(direct.selection.ptr(), state.choice);
  py::object whole = key.bytes();
  if (choice != nullptr && choice != Py_None)
    whole = owned(PyTuple_Pack(2, whole.ptr(), choice));
  PyObject *known = PyDict_GetItemWithError(direct.plans.ptr(), whole.ptr());
  if (known == nullptr && PyErr_Occurred()) throw py::error_already_set();
  py::object plan = py::reinterpret_borrow<py::object>(known);
  if (!plan)
    plan = owned(PyObject_CallFunctionObjArgs(
        direct.plan_of.ptr(), all(values, count).ptr(), whole.ptr(), nullptr));
  const py::object check = owned(PyObject_GetAttr(plan.ptr(), state.check));
  if (!check.is_none()) call(check.ptr(), values, count);
  const py::object function = owned(PyObject_GetAttr(plan.ptr(), state.run));
  return call(function.ptr(), values, count);
}

extern PyMethodDef definition;

PyObject *enter(PyObject *self, PyObject *const *values, Py_ssize_t count) {
  try {
    const Direct &direct = state_of<Direct>(self, definition);
    return run(direct, values, static_cast<size_t>(count)).release().ptr();
  } catch (...) {
    raise_in_python();
  }
  return nullptr;
}

PyMethodDef definition = defined(
    "direct", enter,
    "A call with every declared argument in order: its result, or what `otherwise` answers.");

void watch(py::object parameter, py::object grad_enabled, py::object dispatch_modes,
           py::object function_modes, py::object transforms, py::object tracing,
           py::object any_autocast, py::object autocast, py::object capturing) {
  const std::pair<PyObject **, py::object *> given[] = {
      {&state.parameter, &parameter},           {&state.grad_enabled, &grad_enabled},
      {&state.dispatch_modes, &dispatch_modes}, {&state.function_modes, &function_modes},
      {&state.transforms, &transforms},         {&state.tracing, &tracing},
      {&state.any_autocast, &any_autocast},     {&state.autocast, &autocast},
      {&state.capturing, &capturing}};
  for (const auto &[place, object] : given) *place = object->release().ptr();
  const std::pair<PyObject **, const char *> texts[] = {
      {&state.requires_grad, "requires_grad"}, {&state.type, "type"},   {&state.cpu, "cpu"},
      {&state.choice, "_choice"},              {&state.check, "check"}, {&state.run, "run"}};
  for (const auto &[place, text] : texts)
    *place = owned(PyUnicode_InternFromString(text)).release().ptr();
}

py::object direct(const py::list &parameters, py::dict plans, py::dict selection,
                  py::list recorders, py::object plan_of, py::object otherwise) {
  auto made = std::make_unique<Direct>();
  for (const py::handle each : parameters) {
    const py::tuple given = py::reinterpret_borrow<py::tuple>(each);
    made->parameters.push_back({py::cast<int32_t>(given[0]), py::cast<bool>(given[1])});
  }
  made->plans = std::move(plans);
  made->selection = std::move(selection);
  made->recorders = std::move(recorders);
  made->plan_of = std::move(plan_of);
  made->otherwise = std::move(otherwise);
  return built_in(&definition, std::move(made));
}

}  // namespace

void add_direct(py::module_ &module) {
  module.def("watch", &watch);
  module.def("direct", &direct);
}

}  // namespace transom_c
