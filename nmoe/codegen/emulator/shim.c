/* The CUDA runtime symbols that CuTeDSL host code calls, in place of libcute_dsl_runtime.so. Kernels are handled by
 * name; a launch goes to the callback, synchronously. */
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

typedef int (*LaunchCallback)(const char *kernel, const uint32_t *grid, const uint32_t *block, const uint32_t *cluster,
                              uint64_t dynamic_shared, void **arguments);
static LaunchCallback launch_callback;
static const int error_unknown = 999; /* cudaErrorUnknown */

void emu_set_launch_callback(LaunchCallback callback) { launch_callback = callback; }

/* cudaLaunchConfig_t and the one launch attribute that matters, as the runtime's ABI lays them out. */
typedef struct {
  uint32_t id, padding;
  union {
    uint32_t words[16];
    uint32_t cluster[3];
  } value;
} Attribute;
typedef struct {
  uint32_t grid[3], block[3];
  size_t dynamic_shared;
  void *stream;
  const Attribute *attributes;
  uint32_t n_attributes;
} LaunchConfig;
enum { ATTRIBUTE_CLUSTER = 4 };

int _cudaLaunchKernelEx(const LaunchConfig *config, void *kernel, void **arguments) {
  uint32_t cluster[3] = {1, 1, 1};
  for (uint32_t i = 0; i < config->n_attributes; i++)
    if (config->attributes[i].id == ATTRIBUTE_CLUSTER) memcpy(cluster, config->attributes[i].value.cluster, sizeof cluster);
  if (launch_callback == NULL) return error_unknown;
  return launch_callback(kernel, config->grid, config->block, cluster, config->dynamic_shared, arguments);
}

int _cudaLibraryLoadData(void **library, const void *code, void *a, void *b, unsigned c, void *d, void *e, unsigned f) {
  (void)a, (void)b, (void)c, (void)d, (void)e, (void)f;
  *library = (void *)(uintptr_t)code;
  return 0;
}
int _cudaLibraryUnload(void *library) { return (void)library, 0; }
int _cudaLibraryGetKernel(void **kernel, void *library, const char *name) {
  (void)library;
  *kernel = strdup(name); /* handles live as long as the process, like the modules that hold them */
  return *kernel ? 0 : error_unknown;
}
int _cuKernelGetAttribute(int *value, int attribute, void *kernel, int device) {
  (void)attribute, (void)kernel, (void)device;
  *value = 0;
  return 0;
}
int _cudaDeviceGetAttribute(int *value, int attribute, int device) {
  enum { MULTIPROCESSORS = 16, MAX_SHARED_OPTIN = 97 };
  (void)device;
  *value = attribute == MULTIPROCESSORS ? 148 : attribute == MAX_SHARED_OPTIN ? 232448 : 0;
  return 0;
}
int _cudaKernelSetAttributeForDevice(void *kernel, int attribute, int value, int device) {
  return (void)kernel, (void)attribute, (void)value, (void)device, 0;
}
int _cudaFuncSetAttribute(void *kernel, int attribute, int value) { return (void)kernel, (void)attribute, (void)value, 0; }
int _cudaGetDevice(int *device) { return *device = 0, 0; }
int _cudaSetDevice(int device) { return (void)device, 0; }
int _cudaGetDeviceCount(int *count) { return *count = 1, 0; }
int _cudaGetLastError(void) { return 0; }

int cuda_dialect_init_library_once(void **state, int (*init)(void **), int (*load)(void **, int), void *set_error) {
  (void)set_error;
  if (*state) return 0;
  void *library = NULL;
  int status = init(&library);
  if (status == 0) status = load(&library, 0);
  if (status == 0) *state = library;
  return status;
}
int cuda_dialect_unload_library_once(void **state) { return *state = NULL, 0; }

/* Raises through TVM-FFI's own error setter, which the generated code passes in. */
void CuteDSLRT_TVMFFISetRaisedCudaError(void (*set)(const char *, const char **, int32_t), int code) {
  const char *parts[] = {"the emulated launch failed"};
  (void)code;
  set("RuntimeError", parts, 1);
}
