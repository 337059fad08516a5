#include "parallel.h"

#include <pthread.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <unistd.h>

/* Neither libgomp nor libomp is linked: torch has loaded one of them, under a name that depends on
 * the wheel, and a second one would be a second pool of threads that torch.set_num_threads does not
 * reach. Both have these functions; where neither is loaded, or not globally, they are NULL and
 * kernels run on the calling thread. */
extern "C" {
__attribute__((weak)) void GOMP_parallel(void (*body)(void *), void *data, unsigned threads,
                                         unsigned flags);
__attribute__((weak)) int omp_get_thread_num(void);
}

namespace transom {
namespace {

/* libgomp's threads do not survive fork(), and it waits for them forever: a child stays serial. */
bool forked = false;
int64_t l2 = 1 << 19;
double least_work = 1 << 19;
pthread_once_t prepared = PTHREAD_ONCE_INIT;

void in_child() { forked = true; }

void prepare_once() {
  pthread_atfork(nullptr, nullptr, in_child);
#ifdef _SC_LEVEL2_CACHE_SIZE
  const int64_t told = sysconf(_SC_LEVEL2_CACHE_SIZE);
  if (told >= 1 << 17 && told <= 1 << 24) l2 = told;
#endif
  /* For tests: a small call is split as a large one is. */
  const char *split = getenv("TRANSOM_TEST_SPLIT");
  if (split != nullptr && split[0] == '1') l2 = 1 << 14, least_work = 1;
}

struct Region {
  void (*body)(void *, int32_t);
  void *context;
};

void enter(void *data) {
  const Region *region = static_cast<const Region *>(data);
  region->body(region->context, omp_get_thread_num());
}

}  // namespace

void parallel(int32_t threads, void (*body)(void *, int32_t), void *context) {
  if (threads <= 1 || forked || GOMP_parallel == nullptr || omp_get_thread_num == nullptr) {
    body(context, 0);
    return;
  }
  Region region = {body, context};
  GOMP_parallel(enter, &region, static_cast<unsigned>(threads), 0);
}

int32_t threads_for(double products, int32_t threads) {
  const double wanted = products / least_work;
  return wanted >= threads ? threads : wanted < 1 ? 1 : static_cast<int32_t>(wanted);
}

int64_t l2_bytes() { return l2; }

bool about_to_write(void *memory, int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr int64_t page = 1 << 21;
  if (bytes < 2 * page) return true;
  const int64_t start = reinterpret_cast<int64_t>(memory);
  const int64_t first = (start + page - 1) & -page, end = (start + bytes) & -page;
  unsigned char held = 1;
  if (mincore(reinterpret_cast<void *>((first + end) / 2 & -page), 1, &held) != 0 || held & 1)
    return true;
  /* A hint: where it is refused, small pages serve. */
  madvise(reinterpret_cast<void *>(first), static_cast<size_t>(end - first), MADV_HUGEPAGE);
  return false;
#else
  (void)memory, (void)bytes;
  return true;
#endif
}

void prepare() { pthread_once(&prepared, prepare_once); }

}  // namespace transom
