/* transom._C: calls of C implementations straight from Python's tensors.
 *
 * bind() makes a built-in function of one implementation. A call of it reads each tensor through
 * the table of C functions that torch.Tensor offers (DLPack's exchange API), fills a transom_call
 * on the stack, has torch make the outputs, and runs the implementation without Python's lock.
 * Nothing of libtorch is included or linked, so that one build serves every torch that has the
 * table; without it, or without this module, runtime/abi/call.py does the same through cffi. */
#include "python.h"

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <stdexcept>
#include <string>
#include <string_view>
#include <unordered_map>
#include <utility>
#include <vector>

namespace transom_c {

Names names;

namespace {

constexpr uint32_t kMostOutputs = 16;
constexpr size_t kKept = 1024;                  /* signatures kept of an implementation */
constexpr uint64_t kKeptWorkspace = 64 << 20;   /* bytes kept by a thread: new pages are dear */
constexpr uint64_t kMostWorkspace = 1ULL << 40; /* more is taken for a mistake */

int64_t integer(PyObject *object) {
  const int64_t number = PyLong_AsLongLong(object);
  if (number == -1 && PyErr_Occurred()) throw py::error_already_set();
  return number;
}

/* Workspace on the host. A thread keeps that of its last call; a call within a call finds nothing
 * kept, and makes its own. */
class Scratch {
 public:
  Scratch() = default;
  Scratch(const Scratch &) = delete;
  Scratch &operator=(const Scratch &) = delete;
  ~Scratch() { std::free(data_); }

  void *reach(uint64_t bytes) {
    if (bytes > bytes_) {
      std::free(data_);
      data_ = nullptr;
      bytes_ = 0;
      if (posix_memalign(&data_, 64, bytes) != 0) throw std::bad_alloc();
      bytes_ = bytes;
    }
    return data_;
  }
  void swap(Scratch &other) {
    std::swap(data_, other.data_);
    std::swap(bytes_, other.bytes_);
  }
  bool worth_keeping() const { return bytes_ <= kKeptWorkspace; }

 private:
  void *data_ = nullptr;
  uint64_t bytes_ = 0;
};

thread_local Scratch kept;

struct Parameter {
  std::string name;
  int32_t kind;
  bool optional;
};

struct Hash {
  using is_transparent = void;
  size_t operator()(std::string_view text) const { return std::hash<std::string_view>()(text); }
};
using Known = std::unordered_map<std::string, py::object, Hash, std::equal_to<>>;

struct Function {
  const transom_impl *impl;
  std::string op;
  std::vector<Parameter> parameters;
  py::object makers_of; /* (values) -> for each output (function, arguments, keywords) */
  py::object fail;      /* (code, status code, text): raises */
  py::object greedy;    /* (bytes of workspace): raises */
  py::object far;       /* (device, bytes) -> stream as a number, workspace; not for the host */
  py::object packed;    /* None, or (place, weight) -> its packed form, a tensor, or None */
  std::vector<size_t> written; /* arguments: torch is told that they were */
  Known known;          /* what makers_of() answered, by key */
  const Known::value_type *last = nullptr;

  /* What makes the outputs of a call with this key. */
  py::object makers(std::string_view key, PyObject *const *values) {
    if (last != nullptr && last->first == key) return last->second;
    auto found = known.find(key);
    if (found == known.end()) {
      py::tuple all(parameters.size());
      for (size_t i = 0; i < parameters.size(); i++) all[i] = py::handle(values[i]);
      py::object made = makers_of(all); /* Python: other threads may have been here meanwhile */
      if (known.size() >= kKept) {
        last = nullptr;
        known.clear();
      }
      found = known.insert_or_assign(std::string(key), std::move(made)).first;
    }
    last = &*found;
    return last->second;
  }
};

/* One call. Its arrays are on the stack and written only as far as they are used. */
class Call {
 public:
  explicit Call(Function &function) : f_(function) {}

  py::object operator()(PyObject *const *values) {
    const size_t count = f_.parameters.size();
    for (size_t i = 0; i < count; i++) {
      argument(f_.parameters[i], values[i]);
      if (n_tensors_ == 0) first_ = i + 1;
    }
    if (n_tensors_ == 0) throw std::runtime_error(f_.op + ": a call without a tensor");
    note(tensors_[0].device_type, tensors_[0].device_id);
    const py::object makers = f_.makers({reinterpret_cast<char *>(key_), 8 * words_}, values);
    py::object result = outputs(makers.ptr());
    /* Before it is written: Ctrl-C during the call is raised by the next function of Python. */
    if (!f_.written.empty()) tell(values);
    run(values);
    return result;
  }

 private:
  void argument(const Parameter &p, PyObject *value) {
    const uint32_t first = places_;
    if (p.kind >= 0) {
      plain(p, value);
    } else if (value == Py_None && p.optional) {
      none();
    } else if (p.kind == kWeight && is(value, names.quantized)) {
      quantized(p, value);
    } else {
      tensor(p, value);
    }
    if (p.kind != kWeight) return;
    while (places_ < first + 4) none();
    if (!f_.packed.is_none() && value != Py_None) {
      py::object form = f_.packed(first, py::handle(value));
      if (form.is_none()) return;
      if (packed_ == nullptr) packed_ = static_cast<void **>(std::memset(forms_, 0, sizeof forms_));
      packed_[first] = read(p, form.ptr()).data;
      held_.push_back(std::move(form));
    }
  }

  void quantized(const Parameter &p, PyObject *weight) {
    const py::object buffers = owned(PyObject_GetAttr(weight, names.buffers));
    for (PyObject *part : names.parts) {
      PyObject *value = PyDict_GetItemWithError(buffers.ptr(), part);
      if (value == nullptr || value == Py_None) {
        none();
      } else {
        held_.push_back(py::reinterpret_borrow<py::object>(value));
        tensor(p, value);
      }
    }
    held_.push_back(owned(PyObject_GetAttr(weight, names.spec)));
    text(place(TRANSOM_VALUE_STRING), held_.back().ptr());
  }

  void tensor(const Parameter &p, PyObject *value) {
    transom_tensor &t = read(p, value);
    n_tensors_++;
    place(TRANSOM_VALUE_TENSOR).tensor = &t;
    note(t.dtype_code << 16 | t.dtype_bits, t.ndim);
    for (int32_t i = 0; i < t.ndim; i++) note(t.shape[i]);
  }

  /* The tensor as C sees it, in the next free one of tensors_. */
  transom_tensor &read(const Parameter &p, PyObject *value) {
    if (!is(value, names.tensor)) {
      const char *expected = p.kind == kWeight ? "torch.Tensor or QuantizedWeight" : "torch.Tensor";
      throw py::type_error(f_.op + ": " + p.name + " is " + Py_TYPE(value)->tp_name +
                           "; expected a " + expected);
    }
    transom_tensor &t = tensors_[n_tensors_];
    if (names.exchange->read(value, &t) != 0) throw py::error_already_set();
    if (t.dtype_code == TRANSOM_FLOAT || t.dtype_code == TRANSOM_BFLOAT) {
      /* A view that negates when read (of a complex tensor's conjugate): C reads memory as it is. */
      if (owned(names.is_neg(value, nullptr)).ptr() == Py_True) {
        held_.push_back(owned(PyObject_CallMethodNoArgs(value, names.resolve_neg)));
        if (names.exchange->read(held_.back().ptr(), &t) != 0) throw py::error_already_set();
      }
    }
    return t;
  }

  void plain(const Parameter &p, PyObject *value) {
    if (value == Py_None && p.optional) return none();
    transom_value &v = place(p.kind);
    if (p.kind == TRANSOM_VALUE_STRING) return text(v, value);
    if (p.kind == TRANSOM_VALUE_INTS) return integers(v, value);
    if (p.kind == TRANSOM_VALUE_FLOAT) {
      v.f = PyFloat_AsDouble(value);
      if (v.f == -1.0 && PyErr_Occurred()) throw py::error_already_set();
      int64_t bits;
      std::memcpy(&bits, &v.f, sizeof bits);
      return note(bits);
    }
    v.i = integer(value);
    note(v.i);
  }

  void text(transom_value &v, PyObject *value) {
    Py_ssize_t size = 0;
    v.string = PyUnicode_AsUTF8AndSize(value, &size);
    if (v.string == nullptr) throw py::error_already_set();
    v.count = static_cast<uint32_t>(size);
    note(size);
    for (Py_ssize_t i = 0; i < size; i += 8) {
      int64_t eight = 0;
      std::memcpy(&eight, v.string + i, static_cast<size_t>(size - i < 8 ? size - i : 8));
      note(eight);
    }
  }

  void integers(transom_value &v, PyObject *value) {
    const py::object all = owned(PySequence_Fast(value, "expected a tuple of ints"));
    const Py_ssize_t size = PySequence_Fast_GET_SIZE(all.ptr());
    numbers_.emplace_back(static_cast<size_t>(size) + 1); /* the address of none is not NULL */
    note(size);
    for (Py_ssize_t i = 0; i < size; i++) {
      const int64_t number = integer(PySequence_Fast_GET_ITEM(all.ptr(), i));
      numbers_.back()[static_cast<size_t>(i)] = number;
      note(number);
    }
    v.ints = numbers_.back().data();
    v.count = static_cast<uint32_t>(size);
  }

  py::object outputs(PyObject *makers) {
    const Py_ssize_t count = PyTuple_GET_SIZE(makers);
    if (count > kMostOutputs) throw std::runtime_error(f_.op + ": too many outputs");
    py::object all = count == 1 ? py::object() : owned(PyTuple_New(count));
    for (Py_ssize_t i = 0; i < count; i++) {
      PyObject *maker = PyTuple_GET_ITEM(makers, i);
      PyObject *keywords = PyTuple_GET_ITEM(maker, 2);
      py::object made =
          owned(PyObject_Call(PyTuple_GET_ITEM(maker, 0), PyTuple_GET_ITEM(maker, 1),
                              keywords == Py_None ? nullptr : keywords));
      transom_tensor &t = tensors_[n_tensors_++];
      if (names.exchange->read(made.ptr(), &t) != 0) throw py::error_already_set();
      outs_[n_outs_++] = &t;
      if (count == 1) return made;
      PyTuple_SET_ITEM(all.ptr(), i, made.release().ptr());
    }
    return count == 0 ? py::none() : all;
  }

  void run(PyObject *const *values) {
    transom_call call = {};
    call.struct_size = sizeof call;
    call.n_args = places_;
    call.args = values_;
    call.n_outs = n_outs_;
    call.outs = outs_;
    call.packed = packed_;
    call.threads = static_cast<int32_t>(integer(owned(PyObject_CallNoArgs(names.threads)).ptr()));
    const py::object deterministic = owned(PyObject_CallNoArgs(names.deterministic));
    call.flags = deterministic.ptr() == Py_True ? TRANSOM_CALL_DETERMINISTIC : 0;
    call.workspace_bytes = workspace_bytes(call);
    if (call.workspace_bytes > kMostWorkspace) f_.greedy(call.workspace_bytes);
    Scratch scratch;
    py::object elsewhere;
    if (tensors_[0].device_type != kHost) {
      const py::object device = owned(PyObject_GetAttr(values[first_], names.device));
      const py::tuple given = f_.far(device, call.workspace_bytes);
      call.stream = reinterpret_cast<void *>(py::cast<uintptr_t>(given[0]));
      elsewhere = given[1];
      call.workspace = elsewhere.is_none() ? nullptr : read(kScratch, elsewhere.ptr()).data;
    } else if (call.workspace_bytes != 0) {
      scratch.swap(kept);
      call.workspace = scratch.reach(call.workspace_bytes);
    }
    transom_status status = {};
    int32_t code;
    Py_BEGIN_ALLOW_THREADS
    code = f_.impl->run(&call, &status);
    Py_END_ALLOW_THREADS
    if (call.workspace != nullptr && scratch.worth_keeping()) scratch.swap(kept);
    if (code != 0) {
      const size_t size = strnlen(status.message, sizeof status.message);
      f_.fail(code, status.code, py::bytes(status.message, size));
    }
  }

  /* So that autograd sees what it saved change. */
  void tell(PyObject *const *values) {
    py::tuple all(f_.written.size());
    for (size_t i = 0; i < f_.written.size(); i++) all[i] = py::handle(values[f_.written[i]]);
    owned(PyObject_CallOneArg(names.written, all.ptr()));
  }

  /* The implementation's answer; it may not look at data yet. */
  uint64_t workspace_bytes(const transom_call &call) {
    if (f_.impl->workspace == nullptr) return 0;
    void *data[kMostPlaces + kMostOutputs];
    for (uint32_t i = 0; i < n_tensors_; i++) data[i] = std::exchange(tensors_[i].data, nullptr);
    const uint64_t bytes = f_.impl->workspace(&call);
    for (uint32_t i = 0; i < n_tensors_; i++) tensors_[i].data = data[i];
    return bytes;
  }

  transom_value &place(int32_t tag) {
    transom_value &v = values_[places_++];
    v.tag = tag;
    v.count = 0;
    return v;
  }

  void none() {
    place(TRANSOM_VALUE_NONE).i = 0;
    note(-1);
  }

  /* Adds to the key: all that the outputs follow from. */
  template <class... Number>
  void note(Number... number) {
    if (words_ + sizeof...(number) > kMostKey)
      throw std::runtime_error(f_.op + ": arguments of too many dims or numbers");
    ((key_[words_++] = static_cast<int64_t>(number)), ...);
  }

  static bool is(PyObject *value, PyObject *type) {
    return PyObject_TypeCheck(value, reinterpret_cast<PyTypeObject *>(type));
  }

  inline static const Parameter kScratch = {"workspace", kTensor, false};

  Function &f_;
  uint32_t places_ = 0, n_tensors_ = 0, n_outs_ = 0;
  size_t words_ = 0, first_ = 0; /* first_: the argument that the first tensor stands in */
  void **packed_ = nullptr;
  std::vector<py::object> held_; /* what is used but no argument itself */
  std::vector<std::vector<int64_t>> numbers_;
  transom_value values_[kMostPlaces];
  transom_tensor tensors_[kMostPlaces + kMostOutputs];
  transom_tensor *outs_[kMostOutputs];
  void *forms_[kMostPlaces];
  int64_t key_[kMostKey];
};

extern PyMethodDef definition;

PyObject *enter(PyObject *self, PyObject *const *values, Py_ssize_t count) {
  try {
    Function &function = state_of<Function>(self, definition);
    if (static_cast<size_t>(count) != function.parameters.size())
      throw py::type_error(function.op + ": has " + std::to_string(count) + " arguments; expected " +
                           std::to_string(function.parameters.size()));
    return Call(function)(values).release().ptr();
  } catch (...) {
    raise_in_python();
  }
  return nullptr;
}

PyMethodDef definition = defined(
    "call", enter,
    "The implementation, called with every declared argument in order.");

/* None, or the sentence why this torch's tensors cannot be read. */
py::object set_up(py::object tensor, py::object quantized, py::object threads,
                  py::object deterministic, py::object written) {
  constexpr const char *kTable = "__dlpack_c_exchange_api__";
  if (!py::hasattr(tensor, kTable)) return py::str("this torch has no DLPack exchange table");
  const py::object capsule = tensor.attr(kTable);
  auto *exchange =
      static_cast<const Exchange *>(PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api"));
  if (exchange == nullptr) throw py::error_already_set();
  while (exchange != nullptr && exchange->major != 1) exchange = exchange->previous;
  if (exchange == nullptr || exchange->read == nullptr)
    return py::str("this torch's DLPack exchange table is of another version; expected 1");
  PyObject *is_neg = py::object(tensor.attr("is_neg")).release().ptr();
  if (!Py_IS_TYPE(is_neg, &PyMethodDescr_Type))
    return py::str("this torch's Tensor.is_neg is no built-in method");
  const PyMethodDef *method = reinterpret_cast<PyMethodDescrObject *>(is_neg)->d_method;
  if (method->ml_flags != METH_NOARGS)
    return py::str("this torch's Tensor.is_neg takes arguments; expected none");
  names.is_neg = method->ml_meth;
  names.exchange = exchange;
  names.tensor = tensor.release().ptr();
  names.quantized = quantized.release().ptr();
  names.threads = threads.release().ptr();
  names.deterministic = deterministic.release().ptr();
  names.written = written.release().ptr();
  const std::pair<PyObject **, const char *> texts[] = {
      {&names.resolve_neg, "resolve_neg"}, {&names.device, "device"},
      {&names.buffers, "_buffers"},        {&names.spec, "spec"},
      {&names.parts[0], "values"},         {&names.parts[1], "scales"},
      {&names.parts[2], "zeros"}};
  for (const auto &[place, text] : texts)
    *place = owned(PyUnicode_InternFromString(text)).release().ptr();
  return py::none();
}

/* A built-in function that runs `impl` with every declared argument in order. */
py::object bind(uintptr_t impl, std::string op, const py::list &parameters, py::object makers_of,
                py::object fail, py::object greedy, py::object far, py::object packed,
                const py::list &written) {
  auto function = std::make_unique<Function>();
  function->impl = reinterpret_cast<const transom_impl *>(impl);
  function->op = std::move(op);
  uint32_t places = 0;
  for (const py::handle each : parameters) {
    const py::tuple given = py::reinterpret_borrow<py::tuple>(each);
    function->parameters.push_back(
        {py::cast<std::string>(given[0]), py::cast<int32_t>(given[1]), py::cast<bool>(given[2])});
    places += function->parameters.back().kind == kWeight ? 4 : 1;
  }
  if (places > kMostPlaces) throw py::value_error("too many arguments; expected 48 at most");
  function->makers_of = std::move(makers_of);
  function->fail = std::move(fail);
  function->greedy = std::move(greedy);
  function->far = std::move(far);
  function->packed = std::move(packed);
  for (const py::handle place : written) function->written.push_back(py::cast<size_t>(place));
  return built_in(&definition, std::move(function));
}

}  // namespace
}  // namespace transom_c

PYBIND11_MODULE(_C, module) {
  using namespace transom_c;
  module.doc() = "Calls of C implementations without cffi between them; see csrc/bind.cpp.";
  module.attr("ABI") = py::make_tuple(TRANSOM_ABI_MAJOR, TRANSOM_ABI_MINOR);
  module.attr("TENSOR") = static_cast<int>(kTensor);
  module.attr("WEIGHT") = static_cast<int>(kWeight);
  module.def("set_up", &set_up);
  module.def("bind", &bind);
  add_direct(module);
  add_ranges(module);
}
