/*
 * A GPU that computes nothing: what PyTorch, Triton and ProcessGroupNCCL call of the CUDA runtime and driver, cuBLAS, NVML
 * and NCCL. Device memory is host memory, copies copy, kernels and matrix products do nothing. Whatever is not here,
 * check.py fills in with functions that return 0 for success.
 *
 * FAKE_COUNT: how many GPUs there are (1); FAKE_MEM: bytes of each (150000000000). Memory is counted per process.
 */
#define _GNU_SOURCE
#include <cublasLt.h>
#include <cublas_api.h>
#include <cuda.h>
#include <cuda_runtime_api.h>
#include <nccl.h>

#include <fcntl.h>
#include <pthread.h>
#include <sched.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

#define OK 0
#define OUT_OF_MEMORY 2
#define NO_SUCH_DEVICE 101
#define STREAM cudaStream_t stream

static _Thread_local int device = 0, last_error = 0;

static int count(void) {
    const char *e = getenv("FAKE_COUNT");
    return e ? atoi(e) : 1;
}

static uint64_t total(void) {
    static uint64_t t = 0;
    if (!t) {
        const char *e = getenv("FAKE_MEM");
        t = e ? strtoull(e, 0, 10) : 150000000000ULL;
    }
    return t;
}

/* a handle of something that need not exist: a stream, an event, a module */
static void *new_handle(void) {
    static uintptr_t handle = 0x1000;
    return (void *)__atomic_add_fetch(&handle, 16, __ATOMIC_RELAXED);
}

/* ---- memory: address ranges of their own for the device and for pinned host memory; pages are taken when written */

#define DEVICE_START 0x100000000000ULL
#define HOST_START 0x300000000000ULL
#define HOST_END 0x500000000000ULL
#define PAGE (2u << 20)
#define ROUND_UP(n, to) (((n) + (to) - 1) & ~((uint64_t)(to) - 1))

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static uint64_t next_device = DEVICE_START, next_host = HOST_START, used = 0, peak = 0;

typedef struct {
    uint64_t start, size; /* start 0: free to use */
} Range;
static Range *ranges;
static size_t range_count, range_room;

static void remember(uint64_t start, uint64_t size) {
    for (size_t i = 0; i < range_count; i++)
        if (!ranges[i].start) {
            ranges[i] = (Range){start, size};
            return;
        }
    if (range_count == range_room) {
        range_room = range_room ? 2 * range_room : 1024;
        ranges = realloc(ranges, range_room * sizeof(Range));
    }
    ranges[range_count++] = (Range){start, size};
}

static uint64_t forget(uint64_t start) { /* returns its size */
    for (size_t i = 0; i < range_count; i++)
        if (ranges[i].start == start) {
            ranges[i].start = 0;
            return ranges[i].size;
        }
    return 0;
}

static void *reserve(uint64_t *next, uint64_t size) {
    int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED_NOREPLACE;
    void *p = mmap((void *)*next, size, PROT_READ | PROT_WRITE, flags, -1, 0);
    if (p == MAP_FAILED) return 0;
    *next = ROUND_UP(*next + size + PAGE, PAGE); /* with a gap, so that a wild access faults */
    return p;
}

static int allocate(void **out, size_t size, int on_device) {
    uint64_t n = ROUND_UP(size ? size : 1, PAGE);
    int result = OUT_OF_MEMORY;
    pthread_mutex_lock(&lock);
    if (!on_device || used + n <= total()) {
        void *p = reserve(on_device ? &next_device : &next_host, n);
        if (p) {
            remember((uint64_t)p, n);
            if (on_device) used += n;
            if (used > peak) peak = used;
            *out = p;
            result = OK;
        }
    }
    pthread_mutex_unlock(&lock);
    return result;
}

static int release(void *p, int on_device) {
    if (!p) return OK;
    pthread_mutex_lock(&lock);
    uint64_t n = forget((uint64_t)p);
    if (n) {
        munmap(p, n);
        if (on_device) used -= n;
    }
    pthread_mutex_unlock(&lock);
    return OK;
}

static int on_device(const void *p) { return (uint64_t)p >= DEVICE_START && (uint64_t)p < HOST_START; }
static int is_pinned(const void *p) { return (uint64_t)p >= HOST_START && (uint64_t)p < HOST_END; }

static cudaError_t device_malloc(void **p, size_t n) {
    int error = allocate(p, n, 1);
    if (error) last_error = error;
    return error;
}

cudaError_t cudaMalloc(void **p, size_t n) { return device_malloc(p, n); }
cudaError_t cudaMallocAsync(void **p, size_t n, STREAM) { return device_malloc(p, n); }
cudaError_t cudaFree(void *p) { return release(p, 1); }
cudaError_t cudaFreeAsync(void *p, STREAM) { return release(p, 1); }
cudaError_t cudaHostAlloc(void **p, size_t n, unsigned flags) { return allocate(p, n, 0); }
cudaError_t cudaFreeHost(void *p) { return release(p, 0); }

cudaError_t cudaMemGetInfo(size_t *free, size_t *all) {
    *all = total();
    *free = total() - used;
    return OK;
}

cudaError_t cudaPointerGetAttributes(struct cudaPointerAttributes *a, const void *p) {
    memset(a, 0, sizeof *a);
    a->type = on_device(p)   ? cudaMemoryTypeDevice
              : is_pinned(p) ? cudaMemoryTypeHost
                             : cudaMemoryTypeUnregistered;
    a->device = on_device(p) ? device : -2;
    a->devicePointer = (void *)p;
    a->hostPointer = is_pinned(p) ? (void *)p : 0;
    return OK;
}

/* Memory of the driver's that is reserved and mapped apart: expandable_segments:True of PyTorch's allocator. */

static uint64_t segments[65536]; /* sizes, by handle */
static int next_segment = 1;

static CUresult segment_reserve(CUdeviceptr *p, size_t n, size_t align, CUdeviceptr at, unsigned long long flags) {
    pthread_mutex_lock(&lock);
    *p = (CUdeviceptr)reserve(&next_device, n);
    pthread_mutex_unlock(&lock);
    return *p ? OK : OUT_OF_MEMORY;
}

static CUresult segment_unreserve(CUdeviceptr p, size_t n) {
    munmap((void *)p, n);
    return OK;
}

static CUresult segment_create(CUmemGenericAllocationHandle *h, size_t n, const CUmemAllocationProp *prop,
                               unsigned long long flags) {
    int result = OUT_OF_MEMORY;
    pthread_mutex_lock(&lock);
    if (used + n <= total() && next_segment < 65536) {
        used += n;
        if (used > peak) peak = used;
        segments[next_segment] = n;
        *h = next_segment++;
        result = OK;
    }
    pthread_mutex_unlock(&lock);
    return result;
}

static CUresult segment_release(CUmemGenericAllocationHandle h) {
    pthread_mutex_lock(&lock);
    used -= segments[h];
    segments[h] = 0;
    pthread_mutex_unlock(&lock);
    return OK;
}

static CUresult segment_granularity(size_t *g, const CUmemAllocationProp *prop, int option) {
    *g = PAGE;
    return OK;
}

static int nothing(void) { return OK; }

/* PyTorch asks for the driver's functions by name */
cudaError_t cudaGetDriverEntryPointByVersion(const char *name, void **f, unsigned version, unsigned long long flags,
                                             enum cudaDriverEntryPointQueryResult *result) {
    static const struct {
        const char *name;
        void *f;
    } known[] = {
        {"cuMemAddressReserve", segment_reserve}, {"cuMemAddressFree", segment_unreserve},
        {"cuMemCreate", segment_create},          {"cuMemRelease", segment_release},
        {"cuDeviceGetAttribute", cuDeviceGetAttribute}, {"cuMemGetAllocationGranularity", segment_granularity},
    };
    *f = nothing;
    for (size_t i = 0; i < sizeof known / sizeof *known; i++)
        if (!strcmp(name, known[i].name)) *f = known[i].f;
    if (result) *result = 0;
    return OK;
}

/* ---- copies, which are counted */

static long h2d, d2h, syncs, launches, products;
static uint64_t h2d_bytes, d2h_bytes;

static int copy(void *to, const void *from, size_t n) {
    if (on_device(to) && !on_device(from)) h2d++, h2d_bytes += n;
    if (!on_device(to) && on_device(from)) d2h++, d2h_bytes += n;
    if (on_device(to) && on_device(from) && n > (64u << 20)) return OK; /* large and of nothing that counts: skip it */
    if (n) memmove(to, from, n);
    return OK;
}

static int fill(void *p, int value, size_t n) {
    if (value || n <= (8u << 20)) {
        memset(p, value, n);
        return OK;
    }
    /* large and of zeros: give the pages back, new ones are zero */
    uint64_t end = (uint64_t)p + n, from = ROUND_UP((uint64_t)p, 4096), to = end & ~4095ULL;
    memset(p, 0, from - (uint64_t)p);
    madvise((void *)from, to - from, MADV_DONTNEED);
    memset((void *)to, 0, end - to);
    return OK;
}

cudaError_t cudaMemcpy(void *to, const void *from, size_t n, enum cudaMemcpyKind kind) {
    syncs++;
    return copy(to, from, n);
}
cudaError_t cudaMemcpyAsync(void *to, const void *from, size_t n, enum cudaMemcpyKind kind, STREAM) {
    return copy(to, from, n);
}
cudaError_t cudaMemcpyPeerAsync(void *to, int a, const void *from, int b, size_t n, STREAM) {
    return copy(to, from, n);
}
cudaError_t cudaMemset(void *p, int value, size_t n) { return fill(p, value, n); }
cudaError_t cudaMemsetAsync(void *p, int value, size_t n, STREAM) { return fill(p, value, n); }

static char symbols[1 << 20]; /* every global variable of the device */
cudaError_t cudaGetSymbolAddress(void **p, const void *symbol) {
    *p = symbols;
    return OK;
}

/* ---- the device: an H200 */

static int attribute(int a) {
    switch (a) {
    case cudaDevAttrMaxThreadsPerBlock:
    case cudaDevAttrMaxBlockDimX:
    case cudaDevAttrMaxBlockDimY: return 1024;
    case cudaDevAttrMaxBlockDimZ: return 64;
    case cudaDevAttrMaxGridDimX: return 2147483647;
    case cudaDevAttrMaxGridDimY:
    case cudaDevAttrMaxGridDimZ: return 65535;
    case cudaDevAttrMaxSharedMemoryPerBlock: return 49152;
    case cudaDevAttrTotalConstantMemory: return 65536;
    case cudaDevAttrWarpSize: return 32;
    case cudaDevAttrMaxRegistersPerBlock: return 65536;
    case cudaDevAttrClockRate: return 1980000;
    case cudaDevAttrMultiProcessorCount: return 132;
    case cudaDevAttrConcurrentKernels: return 1;
    case cudaDevAttrMemoryClockRate: return 2619000;
    case cudaDevAttrGlobalMemoryBusWidth: return 5120;
    case cudaDevAttrL2CacheSize: return 52428800;
    case cudaDevAttrMaxThreadsPerMultiProcessor: return 2048;
    case cudaDevAttrUnifiedAddressing: return 1;
    case cudaDevAttrComputeCapabilityMajor: return 9;
    case cudaDevAttrComputeCapabilityMinor: return 0;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor: return 233472;
    case cudaDevAttrMaxRegistersPerMultiprocessor: return 65536;
    case cudaDevAttrManagedMemory: return 1;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: return 232448;
    case cudaDevAttrMaxBlocksPerMultiprocessor: return 32;
    case cudaDevAttrReservedSharedMemoryPerBlock: return 1024;
    case cudaDevAttrMemoryPoolsSupported: return 1;
    default: return 0;
    }
}

cudaError_t cudaDeviceGetAttribute(int *value, enum cudaDeviceAttr a, int d) {
    *value = attribute(a);
    return OK;
}

cudaError_t cudaGetDeviceProperties(struct cudaDeviceProp *p, int d) {
    memset(p, 0, sizeof *p);
    strcpy(p->name, "NVIDIA H200");
    p->major = 9;
    p->totalGlobalMem = total();
    p->totalConstMem = 65536;
    p->l2CacheSize = 52428800;
    p->memoryBusWidth = 5120;
    p->multiProcessorCount = 132;
    p->concurrentKernels = p->unifiedAddressing = 1;
    p->warpSize = 32;
    p->maxThreadsPerBlock = p->maxThreadsDim[0] = p->maxThreadsDim[1] = 1024;
    p->maxThreadsDim[2] = 64;
    p->maxGridSize[0] = 2147483647;
    p->maxGridSize[1] = p->maxGridSize[2] = 65535;
    p->maxThreadsPerMultiProcessor = 2048;
    p->maxBlocksPerMultiProcessor = 32;
    p->regsPerBlock = p->regsPerMultiprocessor = 65536;
    p->sharedMemPerBlock = 49152;
    p->sharedMemPerBlockOptin = 232448;
    p->sharedMemPerMultiprocessor = 233472;
    p->reservedSharedMemPerBlock = 1024;
    return OK;
}

#define GIVES(declaration, what) \
    declaration { \
        what; \
        return OK; \
    }

GIVES(cudaError_t cudaGetDeviceCount(int *n), *n = count())
GIVES(cudaError_t cudaGetDevice(int *d), *d = device)
GIVES(cudaError_t cudaDriverGetVersion(int *v), *v = CUDART_VERSION)
GIVES(cudaError_t cudaRuntimeGetVersion(int *v), *v = CUDART_VERSION)
GIVES(cudaError_t cudaDeviceGetPCIBusId(char *s, int n, int d), snprintf(s, n, "0000:%02x:00.0", d))
GIVES(cudaError_t cudaDeviceCanAccessPeer(int *can, int a, int b), *can = 1)

cudaError_t cudaSetDevice(int d) {
    if (d < 0 || d >= count()) return last_error = NO_SUCH_DEVICE;
    device = d;
    return OK;
}

cudaError_t cudaDeviceGetStreamPriorityRange(int *least, int *greatest) {
    if (least) *least = 0;
    if (greatest) *greatest = -5;
    return OK;
}

const char *cudaGetErrorString(cudaError_t e) {
    return e == OUT_OF_MEMORY ? "out of memory" : e == NO_SUCH_DEVICE ? "invalid device ordinal" : "fake error";
}
const char *cudaGetErrorName(cudaError_t e) {
    return e == OUT_OF_MEMORY ? "cudaErrorMemoryAllocation" : "cudaErrorFake";
}
cudaError_t cudaPeekAtLastError(void) { return last_error; }
cudaError_t cudaGetLastError(void) {
    int e = last_error;
    last_error = OK;
    return e;
}

/* ---- streams and events: all is done when it is asked for, so there is nothing to wait for */

GIVES(cudaError_t cudaStreamCreate(cudaStream_t *s), *s = new_handle())
GIVES(cudaError_t cudaStreamCreateWithFlags(cudaStream_t *s, unsigned flags), *s = new_handle())
GIVES(cudaError_t cudaStreamCreateWithPriority(cudaStream_t *s, unsigned flags, int priority), *s = new_handle())
GIVES(cudaError_t cudaStreamGetPriority(cudaStream_t s, int *priority), *priority = 0)
GIVES(cudaError_t cudaStreamSynchronize(cudaStream_t s), syncs++)
GIVES(cudaError_t cudaDeviceSynchronize(void), syncs++)
GIVES(cudaError_t cudaEventCreate(cudaEvent_t *e), *e = new_handle())
GIVES(cudaError_t cudaEventCreateWithFlags(cudaEvent_t *e, unsigned flags), *e = new_handle())
GIVES(cudaError_t cudaEventElapsedTime(float *ms, cudaEvent_t a, cudaEvent_t b), *ms = 1)
GIVES(cudaError_t cudaStreamIsCapturing(cudaStream_t s, enum cudaStreamCaptureStatus *c), *c = 0)

#undef cudaStreamGetCaptureInfo
cudaError_t cudaStreamGetCaptureInfo(cudaStream_t s, enum cudaStreamCaptureStatus *c, unsigned long long *id,
                                     cudaGraph_t *g, const cudaGraphNode_t **nodes, const cudaGraphEdgeData **edges,
                                     size_t *n) {
    *c = 0;
    if (id) *id = 0;
    return OK;
}

/* ---- kernels: their launches are counted */

static int launch(void) {
    __atomic_add_fetch(&launches, 1, __ATOMIC_RELAXED);
    return OK;
}

/* the counts so far, and the bytes of device memory taken, now and at most */
void fake_stats(long out[9]) {
    long now[9] = {launches, products, h2d, d2h, syncs, h2d_bytes, d2h_bytes, used, peak};
    memcpy(out, now, sizeof now);
}

void __cudaRegisterFunction(void) {}
void **__cudaRegisterFatBinary(void *binary) { return new_handle(); }
void __cudaRegisterFatBinaryEnd(void **module) {}
void __cudaUnregisterFatBinary(void **module) {}
void __cudaRegisterVar(void) {}

/* what <<<grid, block, shared, stream>>> becomes: two calls that hand its numbers on */
static _Thread_local struct {
    dim3 grid, block;
    size_t shared;
    void *stream;
} pushed;

unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, struct CUstream_st *stream) {
    pushed.grid = grid;
    pushed.block = block;
    pushed.shared = shared;
    pushed.stream = stream;
    return OK;
}

cudaError_t __cudaPopCallConfiguration(dim3 *grid, dim3 *block, size_t *shared, void *stream) {
    *grid = pushed.grid;
    *block = pushed.block;
    *shared = pushed.shared;
    *(void **)stream = pushed.stream;
    return OK;
}

GIVES(cudaError_t __cudaGetKernel(cudaKernel_t *k, const void *f), *k = (cudaKernel_t)f)

cudaError_t __cudaLaunchKernel(cudaKernel_t f, dim3 grid, dim3 block, void **args, size_t shared, STREAM) {
    return launch();
}
cudaError_t cudaLaunchKernel(const void *f, dim3 grid, dim3 block, void **args, size_t shared, STREAM) {
    return launch();
}
cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t *config, const void *f, void **args) { return launch(); }

cudaError_t cudaFuncGetAttributes(struct cudaFuncAttributes *a, const void *f) {
    memset(a, 0, sizeof *a);
    a->maxThreadsPerBlock = 1024;
    a->numRegs = 64;
    a->ptxVersion = a->binaryVersion = 90;
    a->maxDynamicSharedSizeBytes = 232448;
    return OK;
}
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int *n, const void *f, int block, size_t shared,
                                                                   unsigned flags) {
    *n = 2;
    return OK;
}

/* ---- the driver, which Triton calls */

GIVES(CUresult cuInit(unsigned flags), )
GIVES(CUresult cuDriverGetVersion(int *v), *v = CUDA_VERSION)
GIVES(CUresult cuDeviceGet(CUdevice *d, int ordinal), *d = ordinal)
GIVES(CUresult cuDeviceGetCount(int *n), *n = count())
GIVES(CUresult cuDeviceGetAttribute(int *value, CUdevice_attribute a, CUdevice d), *value = attribute(a))
GIVES(CUresult cuCtxGetCurrent(CUcontext *c), *c = (void *)16)
GIVES(CUresult cuCtxGetDevice(CUdevice *d), *d = device)  // these two are called by triton 3.9
GIVES(CUresult cuStreamIsCapturing(CUstream s, CUstreamCaptureStatus *status), *status = 0)
GIVES(CUresult cuDevicePrimaryCtxRetain(CUcontext *c, CUdevice d), *c = (void *)16)
GIVES(CUresult cuDevicePrimaryCtxGetState(CUdevice d, unsigned *flags, int *active), (*flags = 0, *active = 1))
GIVES(CUresult cuModuleLoad(CUmodule *m, const char *file), *m = new_handle())
GIVES(CUresult cuModuleLoadData(CUmodule *m, const void *data), *m = new_handle())
GIVES(CUresult cuModuleLoadDataEx(CUmodule *m, const void *data, unsigned n, CUjit_option *options, void **values),
      *m = new_handle())
GIVES(CUresult cuModuleGetFunction(CUfunction *f, CUmodule m, const char *name),
      *f = new_handle())
GIVES(CUresult cuFuncGetAttribute(int *value, CUfunction_attribute a, CUfunction f),
      *value = a == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? 1024 : a == CU_FUNC_ATTRIBUTE_NUM_REGS ? 64 : 0)
GIVES(CUresult cuOccupancyMaxActiveClusters(int *n, CUfunction f, const CUlaunchConfig *config), *n = 1)
GIVES(CUresult cuOccupancyMaxActiveBlocksPerMultiprocessor(int *n, CUfunction f, int block, size_t shared), *n = 2)
GIVES(CUresult cuPointerGetAttribute(void *out, CUpointer_attribute a, CUdeviceptr p), *(uint64_t *)out = p)
GIVES(CUresult cuGetErrorString(CUresult e, const char **s), *s = e == OUT_OF_MEMORY ? "out of memory" : "fake error")

CUresult cuLaunchKernel(CUfunction f, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz,
                        unsigned shared, CUstream stream, void **args, void **extra) {
    return launch();
}
CUresult cuLaunchCooperativeKernel(CUfunction f, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by,
                                   unsigned bz, unsigned shared, CUstream stream, void **args) {
    return launch();
}
CUresult cuLaunchKernelEx(const CUlaunchConfig *config, CUfunction f, void **args, void **extra) { return launch(); }

/* ---- cuBLAS: products are counted */

static int product(void) {
    products++;
    return OK;
}

GIVES(cublasStatus_t cublasCreate_v2(cublasHandle_t *h), *h = new_handle())
GIVES(cublasStatus_t cublasGetMathMode(cublasHandle_t h, cublasMath_t *mode), *mode = 0)
GIVES(cublasStatus_t cublasGetPointerMode_v2(cublasHandle_t h, cublasPointerMode_t *mode), *mode = 0)

cublasStatus_t cublasGemmEx(cublasHandle_t h, cublasOperation_t op_a, cublasOperation_t op_b, int m, int n, int k,
                            const void *alpha, const void *a, cudaDataType_t type_a, int lda, const void *b,
                            cudaDataType_t type_b, int ldb, const void *beta, void *c, cudaDataType_t type_c, int ldc,
                            cublasComputeType_t compute, cublasGemmAlgo_t algo) {
    return product();
}
cublasStatus_t cublasSgemm_v2(cublasHandle_t h, cublasOperation_t op_a, cublasOperation_t op_b, int m, int n, int k,
                              const float *alpha, const float *a, int lda, const float *b, int ldb, const float *beta,
                              float *c, int ldc) {
    return product();
}
cublasStatus_t cublasLtMatmul(cublasLtHandle_t h, cublasLtMatmulDesc_t what, const void *alpha, const void *a,
                              cublasLtMatrixLayout_t layout_a, const void *b, cublasLtMatrixLayout_t layout_b,
                              const void *beta, const void *c, cublasLtMatrixLayout_t layout_c, void *d,
                              cublasLtMatrixLayout_t layout_d, const cublasLtMatmulAlgo_t *algo, void *workspace,
                              size_t workspace_size, STREAM) {
    return product();
}

GIVES(cublasStatus_t cublasLtMatmulDescCreate(cublasLtMatmulDesc_t *d, cublasComputeType_t c, cudaDataType_t t),
      *d = new_handle())
GIVES(cublasStatus_t cublasLtMatmulPreferenceCreate(cublasLtMatmulPreference_t *p), *p = new_handle())
GIVES(cublasStatus_t cublasLtMatrixLayoutCreate(cublasLtMatrixLayout_t *l, cudaDataType t, uint64_t rows, uint64_t cols,
                                                int64_t ld),
      *l = new_handle())
GIVES(cublasStatus_t cublasLtMatmulAlgoGetHeuristic(cublasLtHandle_t h, cublasLtMatmulDesc_t what,
                                                    cublasLtMatrixLayout_t a, cublasLtMatrixLayout_t b,
                                                    cublasLtMatrixLayout_t c, cublasLtMatrixLayout_t d,
                                                    cublasLtMatmulPreference_t p, int most,
                                                    cublasLtMatmulHeuristicResult_t *results, int *n),
      (memset(results, 0, sizeof *results), *n = 1))
size_t cublasLtGetVersion(void) { return 130100; }

/* ---- NCCL: ranks of one machine, over shared memory. A collective is done when its call returns. */

#define CHUNK (1 << 20)
#define MOST_RANKS 8
#define PATIENCE 600 /* seconds that a rank waits for the others */

typedef struct {
    int waiting, generation;
    char pad[56], slot[MOST_RANKS][CHUNK];
} Shared;

struct ncclComm {
    Shared *shared;
    int rank, ranks;
};

static void wait_for_all(ncclComm_t c) {
    Shared *s = c->shared;
    int generation = __atomic_load_n(&s->generation, __ATOMIC_ACQUIRE);
    if (__atomic_add_fetch(&s->waiting, 1, __ATOMIC_ACQ_REL) == c->ranks) { /* the last one opens the door */
        __atomic_store_n(&s->waiting, 0, __ATOMIC_RELAXED);
        __atomic_store_n(&s->generation, generation + 1, __ATOMIC_RELEASE);
        return;
    }
    time_t end = time(0) + PATIENCE;
    for (long i = 0; __atomic_load_n(&s->generation, __ATOMIC_ACQUIRE) == generation; i++) {
        if (i > 200) usleep(100);
        else sched_yield();
        if (time(0) > end) {
            fprintf(stderr, "fake NCCL: rank %d waited %d s for the others\n", c->rank, PATIENCE);
            abort();
        }
    }
}

ncclResult_t ncclGetUniqueId(ncclUniqueId *id) {
    memset(id, 0, sizeof *id);
    int f = open("/dev/urandom", O_RDONLY);
    int bad = read(f, id, 8) < 8;
    close(f);
    return bad;
}

ncclResult_t ncclCommInitRankConfig(ncclComm_t *out, int ranks, ncclUniqueId id, int rank, ncclConfig_t *config) {
    char name[64];
    uint64_t number;
    memcpy(&number, &id, sizeof number);
    snprintf(name, sizeof name, "/fake-nccl-%016llx", (unsigned long long)number);
    int f = ranks > MOST_RANKS ? -1 : shm_open(name, O_CREAT | O_RDWR, 0600);
    if (f < 0 || ftruncate(f, sizeof(Shared))) return 1;
    ncclComm_t c = malloc(sizeof *c);
    c->shared = mmap(0, sizeof(Shared), PROT_READ | PROT_WRITE, MAP_SHARED, f, 0);
    close(f);
    c->rank = rank;
    c->ranks = ranks;
    wait_for_all(c);
    if (rank == 0) shm_unlink(name);
    *out = c;
    return OK;
}

ncclResult_t ncclCommInitRank(ncclComm_t *c, int ranks, ncclUniqueId id, int rank) {
    return ncclCommInitRankConfig(c, ranks, id, rank, 0);
}

GIVES(ncclResult_t ncclGetVersion(int *v), *v = NCCL_VERSION_CODE)
GIVES(ncclResult_t ncclCommGetAsyncError(ncclComm_t c, ncclResult_t *e), *e = 0)
GIVES(ncclResult_t ncclCommCount(const ncclComm_t c, int *n), *n = c->ranks)
GIVES(ncclResult_t ncclCommUserRank(const ncclComm_t c, int *n), *n = c->rank)
const char *ncclGetErrorString(ncclResult_t e) { return "fake error"; }
const char *ncclGetLastError(ncclComm_t c) { return "fake error"; }

static size_t size_of(ncclDataType_t type) {
    switch (type) {
    case ncclInt32:
    case ncclUint32:
    case ncclFloat32: return 4;
    case ncclInt64:
    case ncclUint64:
    case ncclFloat64: return 8;
    case ncclFloat16:
    case ncclBfloat16: return 2;
    default: return 1;
    }
}

#define SUM(type) \
    for (size_t i = 0; i < size / sizeof(type); i++) { \
        type sum = 0; \
        for (int r = 0; r < c->ranks; r++) sum += ((type *)slots[r])[i]; \
        ((type *)to)[i] = sum; \
    }

/* whatever the operation is, it sums; of the types that are not summed, all get what rank 0 has */
static void reduce(ncclComm_t c, void *to, size_t size, ncclDataType_t type) {
    char(*slots)[CHUNK] = c->shared->slot;
    switch (type) {
    case ncclInt64:
    case ncclUint64: SUM(int64_t) break;
    case ncclInt32: SUM(int32_t) break;
    case ncclFloat32: SUM(float) break;
    default: memcpy(to, slots[0], size);
    }
}

ncclResult_t ncclAllReduce(const void *from, void *to, size_t n, ncclDataType_t type, ncclRedOp_t op, ncclComm_t c,
                           STREAM) {
    size_t all = n * size_of(type);
    for (size_t at = 0; at < all; at += CHUNK) {
        size_t size = all - at < CHUNK ? all - at : CHUNK;
        memcpy(c->shared->slot[c->rank], (char *)from + at, size);
        wait_for_all(c);
        reduce(c, (char *)to + at, size, type);
        wait_for_all(c);
    }
    return OK;
}

ncclResult_t ncclBroadcast(const void *from, void *to, size_t n, ncclDataType_t type, int root, ncclComm_t c, STREAM) {
    size_t all = n * size_of(type);
    for (size_t at = 0; at < all; at += CHUNK) {
        size_t size = all - at < CHUNK ? all - at : CHUNK;
        if (c->rank == root) memcpy(c->shared->slot[root], (char *)from + at, size);
        wait_for_all(c);
        memcpy((char *)to + at, c->shared->slot[root], size);
        wait_for_all(c);
    }
    return OK;
}
ncclResult_t ncclBcast(void *p, size_t n, ncclDataType_t type, int root, ncclComm_t c, STREAM) {
    return ncclBroadcast(p, p, n, type, root, c, stream);
}

ncclResult_t ncclAllGather(const void *from, void *to, size_t n, ncclDataType_t type, ncclComm_t c, STREAM) {
    size_t all = n * size_of(type);
    for (size_t at = 0; at < all; at += CHUNK) {
        size_t size = all - at < CHUNK ? all - at : CHUNK;
        memcpy(c->shared->slot[c->rank], (char *)from + at, size);
        wait_for_all(c);
        for (int r = 0; r < c->ranks; r++) memcpy((char *)to + r * all + at, c->shared->slot[r], size);
        wait_for_all(c);
    }
    return OK;
}

/* ---- NVML, as far as PyTorch looks for it by name */

GIVES(int nvmlInit_v2(void), )
GIVES(int nvmlSystemGetCudaDriverVersion_v2(void), )
GIVES(int nvmlDeviceGetHandleByPciBusId_v2(void), )
GIVES(int nvmlDeviceGetComputeRunningProcesses(void), )
GIVES(int nvmlDeviceGetNvLinkRemoteDeviceType(void), )
GIVES(int nvmlDeviceGetNvLinkRemotePciInfo_v2(void), )
int nvmlDeviceGetGpuFabricInfoV(void) { return 3; } /* not supported */
