/* Runs calls from a file on a plugin, in a process without Python and torch.
 *
 *     replay LIBRARY CALLS RESULTS [THREADS ...]
 *
 * calls.py writes CALLS and reads RESULTS. Every tensor and the workspace lie between pages that
 * nobody may touch, flush with the one behind and in another run with the one before; inputs may
 * not be written, outputs and workspace begin as poison. Each call runs so for each number of
 * threads (default 1 2 3 7), and once with a pool that gives one thread whatever was asked for;
 * with packed weights, if the plugin packs; then all calls run again on several threads at once.
 * Every run must give the bits of the first.
 *
 * The OpenMP entries that kernels look for are here, made of plain threads: the driver needs no
 * OpenMP library, and ThreadSanitizer sees all of it. */
#include <dlfcn.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include <set>
#include <string>
#include <vector>

#include "transom_ops.h"

namespace {

[[noreturn]] void fail(const std::string &text) {
  fprintf(stderr, "replay: %s\n", text.c_str());
  exit(1);
}

/* What runs, for whoever reads the report of a fault. */
thread_local char running[256] = "nothing";

/* ---- memory between pages without access ---- */

const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
/* Larger ones are left without access but for the pages that hold elements. */
constexpr size_t kFilled = 1 << 24;

struct Memory {
  char *start = nullptr, *data = nullptr;
  size_t mapped = 0, bytes = 0;
  std::set<char *> pages; /* of a large one: those with access */

  size_t inner() const { return mapped - 2 * page; }
  bool sparse() const { return inner() > kFilled; }

  /* Flush with the guard behind (but aligned), or with the one before. */
  Memory(size_t size, bool behind, size_t alignment, int poison) : bytes(size) {
    mapped = (size + page - 1) / page * page + 2 * page;
    const int how = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
    void *got = mmap(nullptr, mapped, PROT_NONE, how, -1, 0);
    if (got == MAP_FAILED) fail("no address space of " + std::to_string(mapped) + " bytes");
    start = static_cast<char *>(got);
    data = start + page + (behind ? (inner() - size) / alignment * alignment : 0);
    if (sparse()) return;
    mprotect(start + page, inner(), PROT_READ | PROT_WRITE);
    memset(start + page, poison, inner());
  }
  Memory(const Memory &) = delete;
  ~Memory() { munmap(start, mapped); }

  void open(char *at, int poison) {
    char *first = start + static_cast<size_t>(at - start) / page * page;
    if (!pages.insert(first).second) return;
    if (mprotect(first, page, PROT_READ | PROT_WRITE) != 0) fail("mprotect refused");
    memset(first, poison, page);
  }
  void freeze() {
    if (!sparse()) mprotect(start + page, inner(), PROT_READ);
    for (char *each : pages) mprotect(each, page, PROT_READ);
  }
  /* The bytes of the pages around the data, which are all that can be written unpunished. */
  bool slack_is(int poison) const {
    if (sparse()) return true;
    for (char *p = start + page; p < start + mapped - page; p++)
      if ((p < data || p >= data + bytes) && *p != static_cast<char>(poison)) return false;
    return true;
  }
};

/* ---- calls as the file has them ---- */

struct Tensor {
  int64_t code = 0, bits = 0, written = 0;
  std::vector<int64_t> shape, strides;
  std::string dense;

  size_t item() const { return static_cast<size_t>(bits) / 8; }
  size_t count() const {
    size_t n = 1;
    for (int64_t size : shape) n *= static_cast<size_t>(size);
    return n;
  }
  size_t extent() const {
    size_t last = 0;
    if (count() == 0) return 0;
    for (size_t i = 0; i < shape.size(); i++)
      last += static_cast<size_t>((shape[i] - 1) * strides[i]);
    return (last + 1) * item();
  }
  /* Each element: f(bytes in dense, bytes from the first element). */
  template <class F>
  void each(F f) const {
    std::vector<int64_t> at(shape.size());
    size_t offset = 0;
    for (size_t n = 0, all = count(); n < all; n++) {
      f(n * item(), offset * item());
      for (size_t i = shape.size(); i-- > 0;) {
        offset += static_cast<size_t>(strides[i]);
        if (++at[i] < shape[i]) break;
        offset -= static_cast<size_t>(shape[i] * strides[i]);
        at[i] = 0;
      }
    }
  }
  /* NaN between the elements of floats, an index out of range between those of integers. */
  int poison() const { return code == TRANSOM_FLOAT || code == TRANSOM_BFLOAT ? 0xff : 0x7f; }
};

struct Argument {
  int64_t tag = 0, i = 0;
  double f = 0;
  std::string string;
  std::vector<int64_t> ints;
  Tensor tensor;
};

struct Call {
  std::string op;
  std::vector<Argument> args;
  std::vector<int64_t> weights; /* first places */
  std::vector<Tensor> outs;
};

struct Result {
  int64_t code = 0; /* 0 ran, 1 refused, 2 failed */
  int64_t threads = 1; /* the most that a run took */
  std::string text;
  std::vector<std::string> tensors; /* outputs, then arguments that were written */
};

struct Reader {
  FILE *file;
  void bytes(void *to, size_t n) {
    if (fread(to, 1, n, file) != n) fail("the file of calls ends early");
  }
  int64_t number() {
    int64_t n;
    bytes(&n, sizeof n);
    return n;
  }
  std::vector<int64_t> numbers() {
    std::vector<int64_t> out(static_cast<size_t>(number()));
    for (int64_t &n : out) n = number();
    return out;
  }
  std::string text() {
    std::string out(static_cast<size_t>(number()), '\0');
    bytes(out.data(), out.size());
    return out;
  }
  Tensor tensor() {
    Tensor t;
    t.code = number(), t.bits = number(), t.written = number();
    t.shape = numbers(), t.strides = numbers();
    t.dense = text();
    return t;
  }
  Call call() {
    Call c{text(), std::vector<Argument>(static_cast<size_t>(number())), {}, {}};
    for (Argument &a : c.args) {
      a.tag = number();
      if (a.tag == TRANSOM_VALUE_TENSOR) a.tensor = tensor();
      if (a.tag == TRANSOM_VALUE_INT || a.tag == TRANSOM_VALUE_BOOL) a.i = number();
      if (a.tag == TRANSOM_VALUE_FLOAT) bytes(&a.f, sizeof a.f);
      if (a.tag == TRANSOM_VALUE_STRING) a.string = text();
      if (a.tag == TRANSOM_VALUE_INTS) a.ints = numbers();
    }
    c.weights = numbers();
    c.outs.resize(static_cast<size_t>(number()));
    for (Tensor &t : c.outs) t = tensor();
    return c;
  }
};

/* ---- one run ---- */

struct Placed {
  transom_tensor c = {};
  const Tensor *from = nullptr;
  Memory *memory = nullptr;
  std::vector<int64_t> shape, strides; /* exactly as long as they are, so that ASan sees more */
};

/* A call in memory of its own. Without `data`: as supports() and workspace() are asked. */
struct Run {
  std::vector<Placed> tensors;
  std::vector<transom_value> args;
  std::vector<transom_tensor *> outs;
  transom_call call = {};

  Run(const Call &from, int32_t threads, bool data, bool behind, int poison) {
    tensors.resize(from.args.size() + from.outs.size());
    for (size_t i = 0; i < tensors.size(); i++) {
      const bool out = i >= from.args.size();
      if (!out && from.args[i].tag != TRANSOM_VALUE_TENSOR) continue;
      place(&tensors[i], out ? from.outs[i - from.args.size()] : from.args[i].tensor, data, behind,
            out ? poison : -1);
    }
    for (size_t i = 0; i < from.args.size(); i++) {
      const Argument &a = from.args[i];
      transom_value v = {};
      v.tag = static_cast<int32_t>(a.tag);
      const bool ints = a.tag == TRANSOM_VALUE_INTS;
      v.count = static_cast<uint32_t>(ints ? a.ints.size() : a.string.size());
      if (a.tag == TRANSOM_VALUE_TENSOR) v.tensor = &tensors[i].c;
      else if (a.tag == TRANSOM_VALUE_FLOAT) v.f = a.f;
      else if (a.tag == TRANSOM_VALUE_STRING) v.string = a.string.c_str();
      else if (ints) v.ints = a.ints.data();
      else v.i = a.i;
      args.push_back(v);
    }
    for (size_t i = from.args.size(); i < tensors.size(); i++) outs.push_back(&tensors[i].c);
    call.struct_size = sizeof call;
    call.n_args = static_cast<uint32_t>(args.size()), call.args = args.data();
    call.n_outs = static_cast<uint32_t>(outs.size()), call.outs = outs.data();
    call.threads = threads;
  }
  Run(const Run &) = delete;
  ~Run() {
    for (Placed &t : tensors) delete t.memory;
  }

  void place(Placed *t, const Tensor &from, bool data, bool behind, int poison) {
    const bool out = poison >= 0;
    const int fill = out ? poison : from.poison();
    t->from = &from;
    t->shape.assign(from.shape.begin(), from.shape.end());
    t->strides.assign(from.strides.begin(), from.strides.end());
    t->c.device_type = 1;
    t->c.ndim = static_cast<int32_t>(from.shape.size());
    t->c.dtype_code = static_cast<uint8_t>(from.code);
    t->c.dtype_bits = static_cast<uint8_t>(from.bits);
    t->c.dtype_lanes = 1;
    t->c.shape = t->shape.data(), t->c.strides = t->strides.data();
    if (!data || from.count() == 0) return;
    t->memory = new Memory(from.extent(), behind, from.item(), fill);
    t->c.data = t->memory->data;
    if (out) return;
    from.each([&](size_t dense, size_t offset) {
      char *to = t->memory->data + offset;
      if (t->memory->sparse()) t->memory->open(to, fill);
      memcpy(to, from.dense.data() + dense, from.item());
    });
    if (!from.written) t->memory->freeze();
  }

  std::vector<std::string> results() const {
    std::vector<std::string> out;
    const auto take = [&](const Placed &t) {
      std::string bytes(t.from->count() * t.from->item(), '\0');
      t.from->each([&](size_t dense, size_t offset) {
        memcpy(bytes.data() + dense, t.memory->data + offset, t.from->item());
      });
      out.push_back(bytes);
    };
    for (size_t i = args.size(); i < tensors.size(); i++) take(tensors[i]);
    for (size_t i = 0; i < args.size(); i++)
      if (tensors[i].from != nullptr && tensors[i].from->written) take(tensors[i]);
    return out;
  }
};

thread_local int thread_number = 0;
thread_local int64_t most_threads = 1;
thread_local int32_t may_ask_for = 1;
thread_local bool stingy = false; /* the pool gives one thread */

const transom_plugin *plugin;

/* The plugin's own form of a call's weights, between pages without access as well. */
struct Packed {
  std::vector<Memory *> memory;
  std::vector<void *> at;
  bool any = false;

  Packed(const transom_impl *impl, const Call &from, const Run &bare, const Run &run, bool behind,
         int poison) {
    at.resize(from.args.size());
    const transom_services *services = plugin->services;
    if (services == nullptr || services->pack == nullptr) return;
    for (const int64_t place : from.weights) {
      const size_t i = static_cast<size_t>(place);
      const uint32_t which = static_cast<uint32_t>(place);
      if (from.args[i].tag != TRANSOM_VALUE_TENSOR) continue;
      const uint64_t bytes = services->packed_bytes(impl, which, &bare.args[i]);
      if (bytes == 0) continue;
      memory.push_back(new Memory(bytes, behind, 64, poison));
      at[i] = memory.back()->data;
      transom_status status = {};
      if (services->pack(impl, which, &run.args[i], at[i], nullptr, &status) != 0)
        fail(std::string(running) + ": pack failed, " + status.message);
      if (!memory.back()->slack_is(poison)) fail(std::string(running) + ": wrote beside its pack");
      memory.back()->freeze();
      any = true;
    }
  }
  Packed(const Packed &) = delete;
  ~Packed() {
    for (Memory *each : memory) delete each;
  }
};

/* The outputs of one run; or, in result->code and text, why there are none. False if weights should
 * have been packed and it has no such form. */
bool one(const transom_impl *impl, const Call &from, int32_t threads, bool behind, int poison,
         Result *result, bool pack = false) {
  snprintf(running, sizeof running, "%s, %d threads%s, guard page %s", from.op.c_str(), threads,
           stingy ? " asked for and one given" : "", behind ? "behind" : "before");
  if (pack) snprintf(running + strlen(running), sizeof running - strlen(running), ", packed");
  Run bare(from, threads, false, behind, poison), run(from, threads, true, behind, poison);
  const Packed packed(impl, pack ? from : Call(), bare, run, behind, poison);
  if (pack && !packed.any) return false;
  if (packed.any) run.call.packed = packed.at.data();
  const uint64_t wanted = impl->workspace == nullptr ? 0 : impl->workspace(&bare.call);
  Memory workspace(wanted, behind, 64, poison);
  if (workspace.sparse()) fail(from.op + " asks for " + std::to_string(wanted) + " bytes");
  run.call.workspace = wanted == 0 ? nullptr : workspace.data;
  run.call.workspace_bytes = wanted;
  transom_status status = {};
  may_ask_for = threads;
  if (impl->run(&run.call, &status) != 0) {
    result->code = 2;
    result->text = status.message;
  }
  if (thread_number != 0) fail("the calling thread's number changed");
  if (!workspace.slack_is(poison)) fail(std::string(running) + ": wrote beside its workspace");
  for (size_t i = from.args.size(); i < run.tensors.size(); i++)
    if (run.tensors[i].memory != nullptr && !run.tensors[i].memory->slack_is(poison))
      fail(std::string(running) + ": wrote beside an output");
  result->tensors = run.results();
  return true;
}

std::vector<Call> calls;
std::vector<const transom_impl *> impls;
std::vector<Result> results;

void must_equal(size_t i, const Result &got) {
  if (got.code != results[i].code) fail(std::string(running) + ": failed, " + got.text);
  for (size_t t = 0; t < got.tensors.size() && got.code == 0; t++)
    if (got.tensors[t] != results[i].tensors[t])
      fail("call " + std::to_string(i) + ", " + running + ": result " + std::to_string(t) +
           " has other bits than in the first run");
}

void replay(size_t i, const std::vector<int32_t> &threads) {
  const Call &call = calls[i];
  Result *first = &results[i];
  Run bare(call, threads[0], false, true, 0);
  transom_status status = {};
  if (impls[i]->supports != nullptr && impls[i]->supports(&bare.call, &status) != 1) {
    first->code = 1;
    first->text = status.message;
    return;
  }
  most_threads = 1;
  int runs = 0;
  const auto again = [&](int32_t n, bool behind) {
    Result next;
    /* Poison of two kinds: what is not written differs. */
    one(impls[i], call, n, behind, runs % 2 ? 0x5a : 0xff, runs == 0 ? first : &next);
    if (runs++ > 0) must_equal(i, next);
  };
  for (const int32_t n : threads)
    for (const bool behind : {true, false}) again(n, behind);
  first->threads = most_threads;
  stingy = true;
  again(threads.back(), true);
  stingy = false;
  for (const bool behind : {true, false}) {
    Result next;
    if (one(impls[i], call, threads.back(), behind, 0x33, &next, true)) must_equal(i, next);
  }
}

void *all_calls(void *) {
  for (size_t i = 0; i < calls.size(); i++) {
    if (results[i].code != 0) continue;
    Result next;
    one(impls[i], calls[i], 2, true, 0x33, &next);
    must_equal(i, next);
  }
  return nullptr;
}

void write_results(const char *path) {
  FILE *file = fopen(path, "wb");
  if (file == nullptr) fail(std::string("cannot write ") + path);
  const auto number = [&](int64_t n) { fwrite(&n, sizeof n, 1, file); };
  const auto text = [&](const std::string &s) {
    number(static_cast<int64_t>(s.size()));
    fwrite(s.data(), 1, s.size(), file);
  };
  for (const Result &r : results) {
    number(r.code), number(r.threads);
    text(r.text);
    number(static_cast<int64_t>(r.tensors.size()));
    for (const std::string &t : r.tensors) text(t);
  }
  if (fclose(file) != 0) fail(std::string("cannot write ") + path);
}

void say(const char *text) {
  if (write(2, text, strlen(text)) < 0) _exit(1);
}
void say_what_runs() { say("replay: running "), say(running), say("\n"); }
void on_fault(int number) {
  say(number == SIGILL ? "replay: illegal instruction\n" : "replay: touched a guard page\n");
  say_what_runs();
  _exit(1);
}

/* ---- the pool ---- */

struct Worker {
  void (*body)(void *);
  void *data;
  int number;
  char name[sizeof running];
  pthread_t thread;
};

void *work(void *given) {
  Worker *worker = static_cast<Worker *>(given);
  thread_number = worker->number;
  memcpy(running, worker->name, sizeof running);
  worker->body(worker->data);
  return nullptr;
}

}  // namespace

#pragma GCC visibility push(default)
extern "C" {
void __sanitizer_set_death_callback(void (*callback)()) __attribute__((weak));
int omp_get_thread_num() { return thread_number; }

/* As libgomp's: body(data) on each of `threads` threads, this one being number 0. */
void GOMP_parallel(void (*body)(void *), void *data, unsigned threads, unsigned) {
  if (threads < 1 || static_cast<int32_t>(threads) > may_ask_for)
    fail(std::string(running) + ": asked the pool for " + std::to_string(threads));
  if (static_cast<int64_t>(threads) > most_threads) most_threads = threads;
  if (stingy) threads = 1;
  std::vector<Worker> others(threads - 1);
  pthread_attr_t attributes;
  pthread_attr_init(&attributes);
  /* What some systems give a second thread; sanitizers make frames larger. */
  if (__sanitizer_set_death_callback == nullptr) pthread_attr_setstacksize(&attributes, 1 << 19);
  for (unsigned i = 0; i < threads - 1; i++) {
    others[i].body = body, others[i].data = data, others[i].number = static_cast<int>(i) + 1;
    memcpy(others[i].name, running, sizeof running);
    if (pthread_create(&others[i].thread, &attributes, work, &others[i]) != 0)
      fail("no thread");
  }
  body(data);
  for (Worker &worker : others) pthread_join(worker.thread, nullptr);
  pthread_attr_destroy(&attributes);
}
}
#pragma GCC visibility pop

int main(int n, char **given) {
  if (n < 4) fail("usage: replay LIBRARY CALLS RESULTS [THREADS ...]");
  std::vector<int32_t> threads;
  for (int i = 4; i < n; i++) threads.push_back(atoi(given[i]));
  if (threads.empty()) threads = {1, 2, 3, 7};
  if (__sanitizer_set_death_callback != nullptr) {
    __sanitizer_set_death_callback(say_what_runs);
  } else {
    for (const int fault : {SIGSEGV, SIGBUS, SIGILL}) signal(fault, on_fault);
  }

  void *library = dlopen(given[1], RTLD_NOW | RTLD_LOCAL);
  if (library == nullptr) fail(dlerror());
  auto *table = reinterpret_cast<transom_plugin_function *>(dlsym(library, "transom_plugin_v1"));
  if (table == nullptr) fail("the library has no transom_plugin_v1");
  const transom_host host = {sizeof host, TRANSOM_ABI_MAJOR, TRANSOM_ABI_MINOR, "replay"};
  transom_status status = {};
  plugin = table(&host, &status);
  if (plugin == nullptr) fail(status.message);
  printf("%s %s\n", plugin->vendor, plugin->version);

  Reader reader{fopen(given[2], "rb")};
  if (reader.file == nullptr) fail(std::string("cannot read ") + given[2]);
  calls.resize(static_cast<size_t>(reader.number()));
  for (Call &call : calls) {
    call = reader.call();
    const transom_impl *found = nullptr;
    for (uint32_t i = 0; i < plugin->n_impls; i++)
      if (call.op == plugin->impls[i]->op) found = plugin->impls[i];
    if (found == nullptr) fail("the library has no " + call.op);
    impls.push_back(found);
  }
  results.resize(calls.size());
  for (size_t i = 0; i < calls.size(); i++) replay(i, threads);
  std::vector<pthread_t> together(threads.back() > 1 ? 4 : 0);
  for (pthread_t &each : together) pthread_create(&each, nullptr, all_calls, nullptr);
  for (const pthread_t each : together) pthread_join(each, nullptr);
  write_results(given[3]);
  return 0;
}
