/* transom_plugin.h: the table by which a C library offers kernels to transom.
 *
 * A vendor's library exports one function, transom_plugin_v1. It is handed a description of the
 * host and answers with a table of implementations, or with NULL and the reason. Nothing else is
 * looked up; neither libtorch nor Python nor C++ is needed. Include transom_ops.h, which includes
 * this file, declares the function with C linkage, and has for every operator its arguments in
 * order and its schema hash. (This file alone wants <stdint.h> before it: it holds nothing but
 * declarations, because the host reads this very text through cffi.)
 *
 * Rules
 * 1. The major version is part of the function's name. Within it structs only grow: new fields are
 *    appended, and each has a meaning when it is missing. A struct that may grow begins with
 *    struct_size, the writer's sizeof. Read a field only if the struct_size that you were given
 *    covers it (TRANSOM_HAS in transom_ops.h asks). No function becomes required in a minor version. Initialise your tables by field
 *    name: what a later header appends is then zero, which is what missing means.
 * 2. Tensors are borrowed for the duration of the call. The host allocates outputs and workspace; a
 *    plugin frees nothing that it was given and keeps no pointer to it. With a stream the memory of
 *    tensors and workspace, and that alone, is lent until the work enqueued there is done: structs,
 *    shapes and texts are the next call's as soon as the function returns, so copy what you need.
 * 3. Work is enqueued on `stream` and not awaited. stream NULL: it is done when the function
 *    returns.
 * 4. No C++ exception and no longjmp leaves a function. Functions are called without Python's lock,
 *    by any thread, several at once. What they remember between calls is theirs to protect.
 * 5. An implementation that fails answers another number than 0 and writes the reason. Inputs are
 *    then as they were; outputs may hold anything. Texts are UTF-8, one line:
 *    `<what was seen>; <what is supported>[; <what to do>]`.
 *
 * Versions
 * 1.0  The first.
 * 1.1  transom_call: a flag, and packed. transom_plugin: services.
 */

#define TRANSOM_ABI_MAJOR 1
#define TRANSOM_ABI_MINOR 1

/* Codes of transom_status, and what the host raises for them. */
#define TRANSOM_ERROR_VALUE 1       /* ValueError: a tensor holds what the operator excludes */
#define TRANSOM_ERROR_UNSUPPORTED 2 /* NotSupported: supports() could not see it */
#define TRANSOM_ERROR_MEMORY 3      /* MemoryError */
#define TRANSOM_ERROR_DEVICE 4      /* PluginError, as for any other number */

/* Where a function writes why it refused or failed. Handed in zeroed; the last byte stays zero. */
typedef struct transom_status {
  int32_t code;
  char message[508];
} transom_status;

/* dtype codes, those of DLPack. With bits: float32 is TRANSOM_FLOAT and 32. */
#define TRANSOM_INT 0
#define TRANSOM_UINT 1
#define TRANSOM_FLOAT 2
#define TRANSOM_BFLOAT 4
#define TRANSOM_BOOL 6

/* A tensor: field by field DLPack's DLTensor, so that a pointer to one may be cast to the other. It
 * has a name of its own so that any version of dlpack.h can be included beside this file. */
typedef struct transom_tensor {
  void *data; /* NULL in supports() and workspace(), and for a tensor without elements */
  int32_t device_type; /* 1 host, 2 CUDA, 10 ROCm, 12 torch's PrivateUse1 ... as in DLPack */
  int32_t device_id;
  int32_t ndim;
  uint8_t dtype_code;
  uint8_t dtype_bits;
  uint16_t dtype_lanes; /* 1 */
  int64_t *shape;
  int64_t *strides;     /* in elements, always given; 0 where a tensor is expanded */
  uint64_t byte_offset; /* 0: the host has added it to data */
} transom_tensor;

/* What a transom_value holds. */
#define TRANSOM_VALUE_NONE 0 /* an optional argument that was not given */
#define TRANSOM_VALUE_TENSOR 1
#define TRANSOM_VALUE_INT 2
#define TRANSOM_VALUE_FLOAT 3
#define TRANSOM_VALUE_BOOL 4 /* i is 0 or 1 */
#define TRANSOM_VALUE_STRING 5
#define TRANSOM_VALUE_INTS 6

typedef struct transom_value {
  int32_t tag;
  uint32_t count; /* numbers in ints; bytes of string without the zero at its end */
  union {
    int64_t i;
    double f;
    const char *string;
    const int64_t *ints;
    const transom_tensor *tensor;
  };
} transom_value;

/* Flags of a call; bits that you do not know are not for you. */
#define TRANSOM_CALL_DETERMINISTIC 1 /* 1.1: torch.use_deterministic_algorithms is on */

/* One call. Arguments stand in the order of transom_ops.h, every one of them. One that may be a
 * quantised weight takes four places: values, scales, zero points and spec ("int4:1x64"); a plain
 * weight stands in the first and TRANSOM_VALUE_NONE in the other three. */
typedef struct transom_call {
  uint32_t struct_size;
  uint32_t n_args;
  const transom_value *args;
  uint32_t n_outs;
  uint32_t flags;              /* TRANSOM_CALL_...; a 1.0 host gives 0 */
  transom_tensor *const *outs; /* allocated, contiguous, not initialised, apart from all inputs */
  void *stream;                /* the device's native handle; NULL for the host */
  void *workspace;             /* what workspace() asked for, 64-byte aligned; NULL for nothing */
  uint64_t workspace_bytes;
  int32_t threads; /* of the host: how many may be used, torch.get_num_threads(); at least 1 */
  int32_t reserved;
  /* 1.1. NULL, or n_args addresses: at a weight's first place its packed form, if services->pack
   * has written one for this implementation and the weight is unchanged since; else NULL. */
  void *const *packed;
} transom_call;

/* Flags of an implementation. */
#define TRANSOM_DETERMINISTIC 1 /* the same inputs give the same bits */
#define TRANSOM_CAPTURABLE 2    /* neither waits for the device nor allocates on it */

/* Tiers: tuned goes before portable, and either before the operator's meaning in torch. */
#define TRANSOM_PORTABLE 1
#define TRANSOM_TUNED 2

/* One function that computes one operator. */
typedef struct transom_impl {
  uint32_t struct_size;
  int32_t tier;
  const char *op;       /* "grouped_gemm" */
  const char *name;     /* of its own among the operator's; letters, digits and _ */
  uint64_t schema_hash; /* TRANSOM_GROUPED_GEMM_HASH, as compiled. If the host's differs, this
                           implementation is refused with a sentence and the others work */
  uint32_t flags;
  uint32_t reserved;
  /* 1: the call can run. 0: it cannot, and status->message is the sentence that the user reads.
   * Looks at shapes, strides, dtypes and plain arguments: data is NULL. Pure and fast, since the
   * answer is kept. NULL: every call can run. */
  int32_t (*supports)(const transom_call *call, transom_status *status);
  /* Bytes of device memory that run() wants for this call; data is NULL. NULL: none. */
  uint64_t (*workspace)(const transom_call *call);
  /* 0: done, or enqueued. Another number: status says why. Required. */
  int32_t (*run)(const transom_call *call, transom_status *status);
} transom_impl;

/* 1.1. Services of a plugin, each of them optional (NULL). Memory, copies and streams are for a
 * device that brings no torch extension: the Python that mounts it on torch calls them, as
 * transom.CPlugin(path).services; the host itself asks for `stream` where torch names none. A
 * function that answers a number answers 0 or says in status why not. */
#define TRANSOM_TO_DEVICE 1
#define TRANSOM_FROM_DEVICE 2
#define TRANSOM_WITHIN_DEVICE 3

typedef struct transom_services {
  uint32_t struct_size;
  uint32_t reserved;
  /* `bytes` > 0 of the device's memory, 64-byte aligned; NULL: status says why. */
  void *(*allocate)(int32_t device_id, uint64_t bytes, transom_status *status);
  int32_t (*release)(int32_t device_id, void *address, transom_status *status);
  /* Enqueues a copy; with stream NULL it is done on return. */
  int32_t (*copy)(int32_t device_id, void *to, const void *from, uint64_t bytes,
                  int32_t direction, void *stream, transom_status *status);
  /* Waits for all work enqueued on `stream`; NULL: on every stream of the device. */
  int32_t (*synchronize)(int32_t device_id, void *stream, transom_status *status);
  /* The stream that the calling thread's work goes to. */
  void *(*stream)(int32_t device_id);
  /* A weight in a layout of the plugin's own. `weight` points at the four places of args[at]. Bytes
   * of the packed form that impl->run would rather have, 0 for none; depends on what it is given
   * and nothing else; data is NULL. */
  uint64_t (*packed_bytes)(const transom_impl *impl, uint32_t at, const transom_value *weight);
  /* Writes it to `packed`, which the host allocated on the weight's device, 64-byte aligned. The
   * host asks when it meets a weight again unchanged, keeps the form as long as the weight, and
   * drops it when the weight changes. run() therefore works without it as well, and a deterministic
   * one computes the same bits. */
  int32_t (*pack)(const transom_impl *impl, uint32_t at, const transom_value *weight, void *packed,
                  void *stream, transom_status *status);
} transom_services;

/* What a plugin offers. It and all that it points to live as long as the process. */
typedef struct transom_plugin {
  uint32_t struct_size;
  uint16_t abi_major; /* TRANSOM_ABI_MAJOR and _MINOR of the header that it was compiled with */
  uint16_t abi_minor;
  const char *vendor;      /* "acme" */
  const char *version;     /* "1.2.0"; measured choices of another version are void */
  const char *device_type; /* torch's name of the device: "cpu", "cuda", "npu" */
  uint32_t n_impls;
  uint32_t reserved;
  const transom_impl *const *impls; /* pointers: an entry may grow without moving the next */
  const transom_services *services; /* 1.1; NULL: none */
} transom_plugin;

/* Who asks. */
typedef struct transom_host {
  uint32_t struct_size;
  uint16_t abi_major;
  uint16_t abi_minor;
  const char *version; /* transom's own, "0.1.0" */
} transom_host;

/* The type of transom_plugin_v1. NULL: the plugin refuses this host, and status says why. A second
 * call answers the same table. */
typedef const transom_plugin *transom_plugin_function(const transom_host *host,
                                                      transom_status *status);
