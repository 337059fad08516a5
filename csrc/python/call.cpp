/* transom._C: the road of a call, from Python's arguments to the implementation that computes it.
 *
 * A Caller is an operator's: it reads the arguments once, makes sure that nothing in torch wants to
 * see the call (modes, transforms, autocast, tracing, a profiler, a gradient), looks the plan up by
 * what the reading says, and runs it. An implementation in C is handed that same reading, without
 * Python's lock. Plans are made in Python, and whatever is out of the ordinary goes there
 * (runtime/dispatch.py). Tensors are read through the table of C functions that torch.Tensor offers,
 * DLPack's exchange API: nothing of libtorch is included or linked, so that one build serves every
 * torch that has the table. */
#include <cstdlib>
#include <cstring>
#include <new>
#include <stdexcept>
#include <unordered_map>
#include <utility>

#include "extension.h"

namespace transom_c {
namespace {

constexpr uint64_t kKeptWorkspace = 64 << 20;   /* bytes kept by a thread: new pages cost time */
constexpr uint64_t kMostWorkspace = 1ULL << 40; /* more is taken for a mistake */
constexpr int32_t kCuda = 2, kCudaManaged = 13, kRocm = 10, kXpu = 14; /* DLPack's device types */

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

py::tuple all(PyObject *const *values, size_t count) {
  py::tuple tuple(count);
  for (size_t i = 0; i < count; i++) tuple[i] = py::handle(values[i]);
  return tuple;
}

// Implementations in C ----------------------------------------------------------------------------

/* A transom_impl, and the Python that it asks (runtime/abi/plugin.py). */
struct Implementation {
  const transom_impl *impl;
  std::shared_ptr<Operator> op;
  py::object function;         /* its CFunction */
  py::object look;             /* None, or (argument, weight) -> its packed form, or None */
  std::vector<size_t> written; /* arguments: torch is told that they were */
  std::pair<std::string, py::object> last; /* a key of a call without a plan, its makers */

  py::object makers_of(const Reading &reading) const {
    return function.attr("makers")(all(reading.values(), reading.count()));
  }
  py::object run(Reading &reading, PyObject *makers) const;

 private:
  void pack(Reading &reading, void **forms, transom_call *call) const;
  uint64_t workspace_bytes(Reading &reading, const transom_call &call) const;
};

/* Makes the outputs into `outs`; what the caller gets. */
py::object outputs(Reading &reading, PyObject *makers, transom_tensor **outs) {
  const Py_ssize_t count = PyTuple_GET_SIZE(makers);
  if (count > static_cast<Py_ssize_t>(kMostOutputs))
    throw std::runtime_error(reading.op().name + ": too many outputs");
  py::object result = count == 1 ? py::object() : owned(PyTuple_New(count));
  for (Py_ssize_t i = 0; i < count; i++) {
    PyObject *maker = PyTuple_GET_ITEM(makers, i);
    PyObject *keywords = PyTuple_GET_ITEM(maker, 2);
    py::object made = owned(PyObject_Call(PyTuple_GET_ITEM(maker, 0), PyTuple_GET_ITEM(maker, 1),
                                          keywords == Py_None ? nullptr : keywords));
    outs[i] = &reading.more(made.ptr());
    if (count == 1) return made;
    PyTuple_SET_ITEM(result.ptr(), i, made.release().ptr());
  }
  return count == 0 ? py::none() : result;
}

py::object Implementation::run(Reading &reading, PyObject *makers) const {
  transom_tensor *outs[kMostOutputs];
  void *forms[kMostArguments];
  transom_call call = {};
  pack(reading, forms, &call);
  const uint32_t first_output = reading.n_tensors;
  py::object result = outputs(reading, makers, outs);
  call.struct_size = sizeof call;
  call.n_args = reading.n_arguments;
  call.args = reading.arguments;
  call.n_outs = reading.n_tensors - first_output;
  call.outs = outs;
  call.threads = py::cast<int32_t>(owned(PyObject_CallNoArgs(names.threads)));
  call.flags = holds(names.deterministic) ? TRANSOM_CALL_DETERMINISTIC : 0;
  call.workspace_limit = mode.workspace;
  call.workspace_bytes = workspace_bytes(reading, call);
  if (call.workspace_bytes > kMostWorkspace) function.attr("greedy")(call.workspace_bytes);
  Scratch scratch;
  if (reading.device() != kHost) {
    const py::object on = owned(PyObject_GetAttr(reading.first(), names.device));
    const py::tuple given = function.attr("far")(on, call.workspace_bytes);
    call.stream = reinterpret_cast<void *>(py::cast<uintptr_t>(given[0]));
    if (!given[1].is_none()) call.workspace = reading.more(reading.keep(given[1])).data;
  } else if (call.workspace_bytes != 0) {
    scratch.swap(kept);
    call.workspace = scratch.reach(call.workspace_bytes);
  }
  if (!written.empty()) {
    /* So that autograd sees what it saved change; before it is written, since Ctrl-C during the call
     * is raised by the next function of Python. */
    py::tuple changed(written.size());
    for (size_t i = 0; i < written.size(); i++)
      changed[i] = py::handle(reading.values()[written[i]]);
    owned(PyObject_CallOneArg(names.written, changed.ptr()));
  }
  transom_status status = {};
  int32_t code;
  Py_BEGIN_ALLOW_THREADS
  code = impl->run(&call, &status);
  Py_END_ALLOW_THREADS
  if (call.workspace != nullptr && scratch.worth_keeping()) scratch.swap(kept);
  if (code != 0) {
    const size_t size = strnlen(status.message, sizeof status.message);
    function.attr("fail")(code, status.code, py::bytes(status.message, size));
  }
  return result;
}

/* Asks for the packed form of every weight. */
void Implementation::pack(Reading &reading, void **forms, transom_call *call) const {
  if (look.is_none()) return;
  uint32_t at = 0;
  for (size_t i = 0; i < reading.count(); i++) {
    const bool weight = op->parameters[i].kind == kWeight;
    if (weight && reading.values()[i] != Py_None) {
      py::object form = look(at, py::handle(reading.values()[i]));
      if (!form.is_none()) {
        if (call->packed == nullptr) {
          std::memset(forms, 0, kMostArguments * sizeof *forms);
          call->packed = forms;
        }
        transom_tensor t;
        if (names.exchange->read(reading.keep(std::move(form)), &t) != 0)
          throw py::error_already_set();
        forms[at] = t.data;
      }
    }
    at += weight ? 4 : 1;
  }
}

/* The implementation's answer; it may not look at data yet. */
uint64_t Implementation::workspace_bytes(Reading &reading, const transom_call &call) const {
  if (impl->workspace == nullptr) return 0;
  void *data[kMostArguments + kMostOutputs];
  for (uint32_t i = 0; i < reading.n_tensors; i++)
    data[i] = std::exchange(reading.tensors[i].data, nullptr);
  const uint64_t bytes = impl->workspace(&call);
  for (uint32_t i = 0; i < reading.n_tensors; i++) reading.tensors[i].data = data[i];
  return bytes;
}

[[noreturn]] void refuse_without_memory(const Reading &reading) {
  throw py::value_error(reading.op().name + ": " + reading.without_memory() +
                        " elements and no memory; expected a storage that holds them");
}

extern PyMethodDef implementation_definition;

/* A call of an implementation by itself, without a plan. */
PyObject *enter_implementation(PyObject *self, PyObject *const *values, Py_ssize_t count) {
  try {
    const std::shared_ptr<Implementation> own =
        state_of<Implementation>(self, implementation_definition);
    if (static_cast<size_t>(count) != own->op->parameters.size())
      throw py::type_error(own->op->name + ": has " + std::to_string(count) +
                           " arguments; expected " + std::to_string(own->op->parameters.size()));
    Reading reading(*own->op, values, true);
    if (!reading.read())
      return called(py::object(own->function.attr("unreadable")).ptr(), values,
                    static_cast<size_t>(count)).release().ptr();
    if (!reading.without_memory().empty()) refuse_without_memory(reading);
    py::object makers = own->last.second;
    if (!makers || own->last.first != reading.key()) {
      makers = own->makers_of(reading);
      std::pair<std::string, py::object> entry(reading.key(), makers);
      /* What is dropped ends after both are exchanged: its end may let other threads in. */
      std::swap(own->last, entry);
    }
    return own->run(reading, makers.ptr()).release().ptr();
  } catch (...) {
    raise_in_python();
  }
  return nullptr;
}

PyMethodDef implementation_definition =
    defined("implementation", enter_implementation,
            "The implementation, called with every declared argument in order.");

py::object implementation(const py::object &function, py::object look,
                          const std::shared_ptr<Operator> &op) {
  auto made = std::make_shared<Implementation>();
  made->impl = reinterpret_cast<const transom_impl *>(py::cast<uintptr_t>(function.attr("address")));
  made->op = op;
  made->function = function;
  made->look = std::move(look);
  for (const py::handle each : py::list(function.attr("written")))
    made->written.push_back(py::cast<size_t>(each));
  return built_in(&implementation_definition, std::move(made));
}

// Plans -------------------------------------------------------------------------------------------

/* What a call of one key runs. Python makes it, and fills it in. */
struct Plan {
  explicit Plan(py::object record) : record(std::move(record)), check(py::none()) {}

  /* `bounds`: for each range (first argument, second, whether it rises, low, high). Where all of them
   * hold `function`, which would find the same, need not be asked; where one does not, or cannot be
   * read here, it decides and says what is wrong. */
  void set_check(const py::list &bounds, py::object function) {
    for (const py::handle each : bounds) {
      const py::tuple one = py::reinterpret_borrow<py::tuple>(each);
      ranges.push_back({py::cast<size_t>(one[0]), py::cast<size_t>(one[1]), py::cast<bool>(one[2]),
                        py::cast<int64_t>(one[3]), py::cast<int64_t>(one[4])});
    }
    check = std::move(function);
  }
  /* A function of the declared arguments in order; one that implementation() made is entered without
   * Python between. */
  void set_run(py::object function) {
    if (PyCFunction_Check(function.ptr()) &&
        reinterpret_cast<PyCFunctionObject *>(function.ptr())->m_ml == &implementation_definition)
      in_c = state_of<Implementation>(PyCFunction_GET_SELF(function.ptr()),
                                      implementation_definition);
    run = std::move(function);
  }

  py::object record; /* dispatch.Plan */
  std::vector<Range> ranges;
  py::object check, run;
  std::shared_ptr<Implementation> in_c;
  py::object makers; /* of its outputs, once they were asked for */
};

struct Hash {
  using is_transparent = void;
  size_t operator()(std::string_view text) const { return std::hash<std::string_view>()(text); }
};

/* How an operator is called. */
struct Caller {
  std::shared_ptr<Operator> op;
  size_t most; /* plans that are kept; past it all are dropped */
  py::object plan_of;   /* (values, gradient) -> a Plan, and whether it may be kept */
  py::object otherwise; /* (*values) -> result: a call that torch must see */
  py::object unread;    /* (values, gradient) -> result: one that only Python can read */
  std::unordered_map<std::string, std::shared_ptr<Plan>, Hash, std::equal_to<>> plans;

  std::shared_ptr<Plan> plan(Reading &reading, bool gradient);
  py::object run(Reading &reading, bool gradient);
  py::object run_values(const py::tuple &values, bool gradient);
};

bool on_cuda(const Reading &reading) {
  const int32_t device = reading.device();
  return device == kCuda || device == kCudaManaged || device == kRocm;
}

/* Whether something in torch wants to see every call. It is asked before anything else: with a mode
 * in force even the questions about tensors are answered by it. */
bool watched() {
  return holds(names.dispatch_modes) || holds(names.function_modes) || holds(names.transforms) ||
         holds(names.tracing) || holds(names.profiling);
}

/* Whether the call, which nothing watches, may go past torch's dispatcher. */
bool ordinary(const Reading &reading) {
  if (holds(names.grad_enabled)) {
    for (size_t i = 0; i < reading.count(); i++) {
      PyObject *value = reading.values()[i];
      if (!is_exactly(value, names.tensor) && !is_exactly(value, names.parameter)) continue;
      if (owned(PyObject_GetAttr(value, names.requires_grad)).ptr() == Py_True) return false;
    }
  }
  py::object type;
  if (reading.device() != kHost) {
    const py::object device = owned(PyObject_GetAttr(reading.first(), names.device));
    type = owned(PyObject_GetAttr(device.ptr(), names.type));
  }
  PyObject *which = reading.device() == kHost ? names.cpu : type.ptr();
  /* Asking for one device takes four times as long; `any` counts the processor in every torch. */
  const bool casts = reading.device() != kHost || holds(names.any_autocast);
  if (casts && owned(PyObject_CallOneArg(names.autocast, which)).ptr() == Py_True) return false;
  return true;
}

std::shared_ptr<Plan> Caller::plan(Reading &reading, bool gradient) {
  const bool noted = reading.note(holds(names.deterministic)) && reading.note(gradient) &&
                     reading.note(mode.choice);
  const bool capturing = on_cuda(reading) && holds(names.capturing);
  if (noted && !capturing)
    if (const auto found = plans.find(reading.key()); found != plans.end()) return found->second;
  const std::string key(reading.key()); /* Python: other threads may change the plans meanwhile */
  const py::tuple made = plan_of(all(reading.values(), reading.count()), gradient);
  auto result = py::cast<std::shared_ptr<Plan>>(made[0]);
  if (noted && py::cast<bool>(made[1])) {
    if (plans.size() >= most) plans.clear();
    plans.insert_or_assign(key, result);
  }
  return result;
}

py::object Caller::run(Reading &reading, bool gradient) {
  const std::shared_ptr<Plan> found = plan(reading, gradient);
  /* A kernel needs addresses; of the other devices it is not known that all their tensors have one. */
  if (!reading.without_memory().empty() && (reading.device() == kHost || on_cuda(reading) ||
                                            reading.device() == kXpu || found->in_c != nullptr))
    refuse_without_memory(reading);
  bool all_hold = found->check.is_none() || !found->ranges.empty();
  for (size_t i = 0; all_hold && i < found->ranges.size(); i++)
    all_hold = holds(found->ranges[i], reading);
  if (!all_hold) called(found->check.ptr(), reading.values(), reading.count());
  if (mode.recorded != nullptr) {
    const py::tuple values = all(reading.values(), reading.count());
    PyObject *given[] = {found->record.ptr(), values.ptr()};
    return called(mode.recorded, given, 2);
  }
  if (found->in_c == nullptr) return called(found->run.ptr(), reading.values(), reading.count());
  py::object makers = found->makers;
  if (!makers) found->makers = makers = found->in_c->makers_of(reading);
  return found->in_c->run(reading, makers.ptr());
}

/* A call that torch's dispatcher has let through. */
py::object Caller::run_values(const py::tuple &values, bool gradient) {
  PyObject *const *items = PySequence_Fast_ITEMS(values.ptr());
  Reading reading(*op, items, true);
  if (!reading.read()) return unread(values, gradient);
  return run(reading, gradient);
}

extern PyMethodDef caller_definition;

PyObject *enter_caller(PyObject *self, PyObject *const *values, Py_ssize_t count) {
  try {
    const std::shared_ptr<Caller> own = state_of<Caller>(self, caller_definition);
    const size_t given = static_cast<size_t>(count);
    if (given == own->op->parameters.size() && !watched()) {
      Reading reading(*own->op, values, false);
      if (reading.read() && reading.without_memory().empty() && ordinary(reading))
        return own->run(reading, false).release().ptr();
    }
    return called(own->otherwise.ptr(), values, given).release().ptr();
  } catch (...) {
    raise_in_python();
  }
  return nullptr;
}

PyMethodDef caller_definition =
    defined("enter", enter_caller,
            "An eager call with every declared argument in order: its result.");

py::list records(const Caller &caller) {
  py::list all;
  for (const auto &[key, plan] : caller.plans) all.append(plan->record);
  return all;
}

// What is asked of torch --------------------------------------------------------------------------

/* None, or the sentence why this torch's tensors cannot be read. `given` holds what the fields of
 * Names are called: types, and functions of torch. */
py::object set_up(const py::dict &given) {
  constexpr const char *kTable = "__dlpack_c_exchange_api__";
  const py::object tensor = given["tensor"];
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
  const std::pair<PyObject **, const char *> objects[] = {
      {&names.tensor, "tensor"},
      {&names.parameter, "parameter"},
      {&names.quantized, "quantized"},
      {&names.threads, "threads"},
      {&names.deterministic, "deterministic"},
      {&names.written, "written"},
      {&names.grad_enabled, "grad_enabled"},
      {&names.dispatch_modes, "dispatch_modes"},
      {&names.function_modes, "function_modes"},
      {&names.transforms, "transforms"},
      {&names.tracing, "tracing"},
      {&names.profiling, "profiling"},
      {&names.any_autocast, "any_autocast"},
      {&names.autocast, "autocast"},
      {&names.capturing, "capturing"}};
  for (const auto &[to, name] : objects) *to = py::object(given[name]).release().ptr();
  const std::pair<PyObject **, const char *> texts[] = {
      {&names.resolve_neg, "resolve_neg"}, {&names.device, "device"},
      {&names.type, "type"},               {&names.cpu, "cpu"},
      {&names.requires_grad, "requires_grad"}, {&names.is_pinned, "is_pinned"},
      {&names.buffers, "_buffers"},        {&names.spec, "spec"},
      {&names.parts[0], "values"},         {&names.parts[1], "scales"},
      {&names.parts[2], "zeros"}};
  for (const auto &[to, text] : texts) *to = owned(PyUnicode_InternFromString(text)).release().ptr();
  return py::none();
}

void set_recorded(const py::object &hook) {
  PyObject *before = mode.recorded;
  mode.recorded = hook.is_none() ? nullptr : py::object(hook).release().ptr();
  Py_XDECREF(before);
}

}  // namespace
}  // namespace transom_c

PYBIND11_MODULE(_C, module) {
  using namespace transom_c;
  module.doc() = "Calls of operators, without Python between where nothing asks for it.";
  module.attr("ABI") = py::make_tuple(TRANSOM_ABI_MAJOR, TRANSOM_ABI_MINOR);
  module.attr("TENSOR") = static_cast<int>(kTensor);
  module.attr("WEIGHT") = static_cast<int>(kWeight);
  module.def("set_up", &set_up);
  module.def("set_choice", [](const std::string &choice) { mode.choice = choice; });
  module.def("set_recorded", &set_recorded);
  module.def("set_workspace", [](uint64_t bytes) { mode.workspace = bytes; });
  py::class_<Operator, std::shared_ptr<Operator>>(module, "Operator").def(py::init(&operator_of));
  module.def("implementation", &implementation);
  py::class_<Plan, std::shared_ptr<Plan>>(module, "Plan")
      .def(py::init<py::object>())
      .def("set_check", &Plan::set_check)
      .def("set_run", &Plan::set_run);
  py::class_<Caller, std::shared_ptr<Caller>>(module, "Caller")
      .def(py::init([](std::shared_ptr<Operator> op, size_t most, py::object plan_of,
                       py::object otherwise, py::object unread) {
        return std::make_shared<Caller>(Caller{std::move(op), most, std::move(plan_of),
                                               std::move(otherwise), std::move(unread), {}});
      }))
      .def_property_readonly(
          "enter",
          [](const std::shared_ptr<Caller> &own) { return built_in(&caller_definition, own); })
      .def("run", &Caller::run_values)
      .def("plans", &records)
      .def("forget", [](Caller &own) { own.plans.clear(); });
}
