/* NVIDIA's driver as far as our use of pycuda needs it, over the CPU's memory: a stack of contexts
   per thread, and counts of what is there. What needs a current context fails without one. */

#include <stdlib.h>

enum { OK = 0, OUT_OF_MEMORY = 2, INVALID_CONTEXT = 201 };
enum { MOST = 1 << 20, DEPTH = 64 };

static _Thread_local void *stack[DEPTH];
static _Thread_local int depth;
static int primary; /* times that the primary context is retained */
static int memory, pinned, streams;

int stand_in_depth(void) { return depth; }
int stand_in_primary(void) { return primary; }
int stand_in_live(void) { return memory + pinned + streams; }

static int count(int *counter, int by) {
  if (!depth) return INVALID_CONTEXT;
  *counter += by;
  return OK;
}

int cuInit(unsigned flags) { return OK; }
int cuGetErrorString(int error, const char **text) {
  *text = error == OUT_OF_MEMORY ? "out of memory" : "invalid device context";
  return OK;
}
int cuDeviceGet(int *device, int number) { return *device = number, OK; }
int cuDevicePrimaryCtxRetain(void **context, int device) {
  primary++;
  return *context = &primary, OK;
}
int cuDevicePrimaryCtxRelease_v2(int device) { return primary--, OK; }
int cuCtxPushCurrent_v2(void *context) { return stack[depth++] = context, OK; }
int cuCtxPopCurrent_v2(void **context) {
  if (!depth) return INVALID_CONTEXT;
  return *context = stack[--depth], OK;
}
int cuMemAlloc_v2(unsigned long long *address, size_t size) {
  if (size > MOST) return OUT_OF_MEMORY;
  *address = (unsigned long long)malloc(size);
  return count(&memory, 1);
}
int cuMemFree_v2(unsigned long long address) { return count(&memory, -1); }
int cuMemHostAlloc(void **address, size_t size, unsigned flags) {
  if (size > MOST) return OUT_OF_MEMORY;
  *address = malloc(size);
  return count(&pinned, 1);
}
int cuMemFreeHost(void *address) { return count(&pinned, -1); }
int cuStreamCreate(void **stream, unsigned flags) {
  *stream = malloc(1);
  return count(&streams, 1);
}
int cuStreamDestroy_v2(void *stream) { return count(&streams, -1); }
