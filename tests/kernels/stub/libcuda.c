// A stand-in for NVIDIA's libcuda.so.1 with what Triton's launcher (3.6 to 3.9) calls of it. It has one device, loads
// nothing, launches nothing and writes down what it was given: Triton's own launcher runs against it where no GPU is.
// It refuses what the driver documents as invalid of a tensor map.

#include <cuda.h>
#include <stdint.h>
#include <string.h>

enum { MOST_PARAMS = 256, MOST_BYTES = 1 << 16 };

// What a tensor map says, in the place of the 128 bytes whose layout NVIDIA does not document.
typedef struct {
    uint64_t address;
    uint64_t dims[5];     // innermost first
    uint64_t strides[4];  // bytes, of all but the innermost
    uint32_t box[5];
    uint16_t type, rank, swizzle, fill;
} Map;

_Static_assert(sizeof(Map) <= sizeof(CUtensorMap), "a tensor map has 128 bytes");

static struct {
    uint32_t grid[3], block[3], shared, launches, encoded;
    uint64_t function;
    int count;
    int sizes[MOST_PARAMS];
    unsigned char bytes[MOST_BYTES];
    int device_attributes[256];
} state;

// The sizes of the next launches' parameters: what the kernel reads of each, as its PTX declares it.
void stub_expect(int count, const int *sizes) {
    state.count = count;
    if (count) memcpy(state.sizes, sizes, sizeof(int) * count);
}

void stub_set_attribute(int attribute, int value) { state.device_attributes[attribute] = value; }

// grid, block, shared memory, how many launches there were, how many tensor maps were made.
void stub_launched(uint32_t *numbers) {
    memcpy(numbers, state.grid, sizeof state.grid);
    memcpy(numbers + 3, state.block, sizeof state.block);
    numbers[6] = state.shared, numbers[7] = state.launches, numbers[8] = state.encoded;
}

const unsigned char *stub_bytes(void) { return state.bytes; }

CUresult cuLaunchKernelEx(const CUlaunchConfig *config, CUfunction function, void **params, void **extra) {
    uint32_t grid[] = {config->gridDimX, config->gridDimY, config->gridDimZ};
    uint32_t block[] = {config->blockDimX, config->blockDimY, config->blockDimZ};
    memcpy(state.grid, grid, sizeof grid);
    memcpy(state.block, block, sizeof block);
    state.shared = config->sharedMemBytes, state.function = (uint64_t)function, state.launches++;
    unsigned char *to = state.bytes;
    for (int i = 0; i < state.count; to += state.sizes[i++]) memcpy(to, params[i], state.sizes[i]);
    return CUDA_SUCCESS;
}

CUresult cuTensorMapEncodeTiled(CUtensorMap *map, CUtensorMapDataType type, cuuint32_t rank, void *address,
                                const cuuint64_t *dims, const cuuint64_t *strides, const cuuint32_t *box,
                                const cuuint32_t *steps, CUtensorMapInterleave interleave, CUtensorMapSwizzle swizzle,
                                CUtensorMapL2promotion promotion, CUtensorMapFloatOOBfill fill) {
    Map made = {(uint64_t)address, {0}, {0}, {0}, (uint16_t)type, (uint16_t)rank, (uint16_t)swizzle, (uint16_t)fill};
    if (rank < 1 || rank > 5 || !address || (uintptr_t)address % 16 || (uintptr_t)map % 64) return CUDA_ERROR_INVALID_VALUE;
    for (cuuint32_t i = 0; i < rank; ++i) {
        if (dims[i] < 1 || dims[i] > 1ull << 32 || box[i] < 1 || box[i] > 256 || steps[i] != 1)
            return CUDA_ERROR_INVALID_VALUE;
        made.dims[i] = dims[i], made.box[i] = box[i];
        if (i + 1 < rank) {
            if (strides[i] % 16 || strides[i] >= 1ull << 40) return CUDA_ERROR_INVALID_VALUE;
            made.strides[i] = strides[i];
        }
    }
    memset(map, 0, sizeof *map);
    memcpy(map, &made, sizeof made);
    state.encoded++;
    return CUDA_SUCCESS;
}

CUresult cuTensorMapReplaceAddress(CUtensorMap *map, void *address) {
    if (!address || (uintptr_t)address % 16 || (uintptr_t)map % 64) return CUDA_ERROR_INVALID_VALUE;
    uint64_t number = (uint64_t)address;
    memcpy(map, &number, sizeof number);
    return CUDA_SUCCESS;
}

CUresult cuModuleGetFunction(CUfunction *function, CUmodule module, const char *name) {
    static uint64_t next;
    *function = (CUfunction)++next;
    return CUDA_SUCCESS;
}

CUresult cuFuncGetAttribute(int *value, CUfunction_attribute attribute, CUfunction function) {
    *value = attribute == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? 1024 : 0;
    return CUDA_SUCCESS;
}

CUresult cuDeviceGetAttribute(int *value, CUdevice_attribute attribute, CUdevice device) {
    *value = state.device_attributes[attribute];
    return CUDA_SUCCESS;
}

CUresult cuPointerGetAttribute(void *value, CUpointer_attribute attribute, CUdeviceptr address) {
    if (attribute != CU_POINTER_ATTRIBUTE_DEVICE_POINTER) return CUDA_ERROR_NOT_SUPPORTED;
    memcpy(value, &address, sizeof address);
    return CUDA_SUCCESS;
}

CUresult cuGetErrorString(CUresult error, const char **words) {
    *words = error == CUDA_ERROR_INVALID_VALUE ? "invalid argument" : "the stand-in for libcuda does not do this";
    return CUDA_SUCCESS;
}

CUresult cuDriverGetVersion(int *version) { return *version = 13020, CUDA_SUCCESS; }
CUresult cuCtxGetCurrent(CUcontext *context) { return *context = (CUcontext)1, CUDA_SUCCESS; }
CUresult cuCtxSetCurrent(CUcontext context) { return CUDA_SUCCESS; }
CUresult cuCtxGetDevice(CUdevice *device) { return *device = 0, CUDA_SUCCESS; }
CUresult cuDeviceGet(CUdevice *device, int ordinal) { return *device = ordinal, CUDA_SUCCESS; }
CUresult cuDevicePrimaryCtxRetain(CUcontext *context, CUdevice device) { return *context = (CUcontext)1, CUDA_SUCCESS; }
CUresult cuModuleLoadData(CUmodule *module, const void *image) { return *module = (CUmodule)1, CUDA_SUCCESS; }
CUresult cuModuleUnload(CUmodule module) { return CUDA_SUCCESS; }
CUresult cuFuncSetAttribute(CUfunction function, CUfunction_attribute attribute, int value) { return CUDA_SUCCESS; }
CUresult cuFuncSetCacheConfig(CUfunction function, CUfunc_cache config) { return CUDA_SUCCESS; }

// Linked against and not called here; by their symbols alone, whatever they take.
#define REFUSED(name)                         \
    CUresult refused_##name(void) __asm__(#name); \
    CUresult refused_##name(void) { return CUDA_ERROR_NOT_SUPPORTED; }
REFUSED(cuCtxGetLimit)
REFUSED(cuCtxSetLimit)
REFUSED(cuOccupancyMaxActiveClusters)
REFUSED(cuStreamIsCapturing)
REFUSED(cuTensorMapEncodeIm2col)
