/* The part of libcuda, the driver, that torch and Triton look up. Nothing is launched. */
#include <stdlib.h>

int cuInit(unsigned flags) { return 0; }
int cuDriverGetVersion(int *version) { *version = 13020; return 0; }
int cuDeviceGetCount(int *count) { *count = 1; return 0; }
int cuDeviceGet(int *device, int ordinal) { *device = 0; return 0; }
int cuDevicePrimaryCtxGetState(int device, unsigned *flags, int *active) { *flags = 0; *active = 0; return 0; }
int cuGetErrorString(int error, const char **text) { *text = "no driver"; return 0; }
int cuCtxGetCurrent(void **context) { *context = 0; return 0; }
int cuGetProcAddress_v2(const char *symbol, void **function, int version, unsigned long flags, void *status) {
  *function = 0;
  return 500; /* not found */
}
int cuDeviceGetAttribute(int *value, int attribute, int device) {
  const char *text = getenv("TRACE_CAPABILITY");
  int capability = text ? atoi(text) : 90;
  /* compute capability (attributes 75, 76), shared memory of a block that asks for the most (97) */
  *value = attribute == 75 ? capability / 10 : attribute == 76 ? capability % 10
           : attribute == 97 ? (capability < 90 ? 166912 : 232448) : 1024;
  return 0;
}
int cuFuncGetAttribute(int *value, int attribute, void *function) {
  *value = attribute == 0 ? 1024 : 0; /* threads of a block; nothing is known of registers and local memory */
  return 0;
}
#define IGNORED(name) int name() { return 0; }
IGNORED(cuModuleLoad)
IGNORED(cuModuleLoadData)
IGNORED(cuModuleGetFunction)
IGNORED(cuModuleUnload)
IGNORED(cuFuncSetAttribute)
IGNORED(cuFuncSetCacheConfig)
IGNORED(cuCtxSetCurrent)
IGNORED(cuCtxGetDevice)
IGNORED(cuCtxGetLimit)
IGNORED(cuCtxSetLimit)
IGNORED(cuDevicePrimaryCtxRetain)
IGNORED(cuLaunchKernel)
IGNORED(cuLaunchKernelEx)
IGNORED(cuOccupancyMaxActiveClusters)
IGNORED(cuTensorMapEncodeTiled)
IGNORED(cuMemcpyDtoHAsync_v2)
IGNORED(cuPointerGetAttribute)
IGNORED(cuStreamIsCapturing)
