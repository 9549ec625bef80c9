// A libcuda.so.1 with the few functions that passdeploy.kernels.driver calls: one device, whose kernels are those of the
// emulator. With it the real cuda-bindings run without a GPU, down to how they hand parameters over.
//
// EMULATED_KERNELS: the emulator's libraries, separated by colons. Context handles are numbers: 0x100 + device.
#include <dlfcn.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <sstream>
#include <string>
#include <vector>

namespace {

enum { kSuccess = 0, kInvalidValue = 1, kInvalidImage = 200, kInvalidContext = 201, kNotFound = 500 };

struct Function {
  void* library;
  void* kernel;
};
struct Module {
  std::vector<Function*> functions;
};

std::vector<void*> libraries;
thread_local std::vector<uintptr_t> contexts;

// One line per call of interest, for the test to read.
void say(const std::string& line) {
  std::printf("%s\n", line.c_str());
  std::fflush(stdout);
}

}  // namespace

extern "C" {

int cuInit(unsigned int) {
  const char* paths = std::getenv("EMULATED_KERNELS");
  if (!libraries.empty() || paths == nullptr) return kSuccess;
  std::stringstream each(paths);
  for (std::string path; std::getline(each, path, ':');) {
    void* library = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
    if (library == nullptr) return kInvalidValue;
    libraries.push_back(library);
  }
  return kSuccess;
}
// NVRTC asks for it, and does without.
int cuGetExportTable(const void**, const void*) { return kNotFound; }
int cuDriverGetVersion(int* version) {
  *version = 13000;
  return kSuccess;
}
int cuDeviceGetCount(int* count) {
  *count = 2;
  return kSuccess;
}
int cuDeviceGet(int* device, int ordinal) {
  *device = ordinal;
  return kSuccess;
}
int cuDeviceGetAttribute(int* value, int attribute, int) {
  *value = attribute == 75 ? 8 : attribute == 76 ? 9 : 0;  // compute capability 8.9
  return kSuccess;
}
int cuDevicePrimaryCtxRetain(uintptr_t* context, int device) {
  *context = 0x100 + device;
  return kSuccess;
}
// The lower half of the addresses is the first device's.
int cuPointerGetAttribute(void* data, int attribute, uintptr_t address) {
  if (attribute != 9) return kInvalidValue;  // CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL
  *static_cast<int*>(data) = address >> 63 ? 1 : 0;
  return kSuccess;
}
int cuCtxGetCurrent(uintptr_t* context) {
  *context = contexts.empty() ? 0 : contexts.back();
  return kSuccess;
}
int cuCtxSetCurrent(uintptr_t context) {
  if (!contexts.empty()) contexts.pop_back();
  contexts.push_back(context);
  return kSuccess;
}
int cuCtxPushCurrent(uintptr_t context) {
  contexts.push_back(context);
  return kSuccess;
}
int cuCtxPopCurrent(uintptr_t* context) {
  if (contexts.empty()) return kInvalidContext;
  *context = contexts.back();
  contexts.pop_back();
  return kSuccess;
}
int cuCtxGetDevice(int* device) {
  if (contexts.empty()) return kInvalidContext;
  *device = static_cast<int>(contexts.back() - 0x100);
  return kSuccess;
}
int cuModuleLoadData(void** module, const void* image) {
  if (contexts.empty()) return kInvalidContext;
  const bool elf = std::memcmp(image, "\177ELF", 4) == 0;
  say(elf ? "load cubin" : "load other");
  if (!elf) return kInvalidImage;
  *module = new Module;
  return kSuccess;
}
int cuModuleGetFunction(void** function, Module* module, const char* name) {
  for (void* library : libraries) {
    if (void* kernel = dlsym(library, name)) {
      module->functions.push_back(new Function{library, kernel});
      *function = module->functions.back();
      return kSuccess;
    }
  }
  return kNotFound;
}
int cuLaunchKernel(const Function* function, unsigned int x, unsigned int y, unsigned int z, unsigned int threads,
                   unsigned int threads_y, unsigned int threads_z, unsigned int shared, uintptr_t stream, void** params,
                   void** extra) {
  if (contexts.empty()) return kInvalidContext;
  if (threads_y != 1 || threads_z != 1 || extra != nullptr) return kInvalidValue;
  say("launch context " + std::to_string(contexts.back() - 0x100) + " stream " + std::to_string(stream));
  reinterpret_cast<void (*)()>(dlsym(function->library, "clear_regions"))();
  reinterpret_cast<void (*)()>(dlsym(function->library, "allow_all_addresses"))();
  using Emulate = int (*)(void*, void*, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned);
  const auto emulate = reinterpret_cast<Emulate>(dlsym(function->library, "emulate"));
  return emulate(function->kernel, params[0], x, y, z, threads, shared, 0) == 0 ? kSuccess : kInvalidValue;
}

int cuEventCreate(uintptr_t* event, unsigned int flags) {
  if (contexts.empty()) return kInvalidContext;
  *event = 0x500 + flags;
  return kSuccess;
}
int cuEventRecord(uintptr_t event, uintptr_t stream) {
  say("record event " + std::to_string(event - 0x500) + " stream " + std::to_string(stream));
  return kSuccess;
}
int cuStreamWaitEvent(uintptr_t stream, uintptr_t event, unsigned int) {
  say("stream " + std::to_string(stream) + " waits for event " + std::to_string(event - 0x500));
  return kSuccess;
}
int cuEventDestroy(uintptr_t) { return kSuccess; }

// How cuda-bindings ask for functions: by name, without the version suffix.
int cuGetProcAddress_v2(const char* symbol, void** function, int, uint64_t, int* found) {
  *function = dlsym(RTLD_DEFAULT, symbol);
  if (*function == nullptr) {
    void* self = dlopen("libcuda.so.1", RTLD_NOW | RTLD_NOLOAD);
    *function = self == nullptr ? nullptr : dlsym(self, symbol);
  }
  if (found != nullptr) *found = *function == nullptr ? 1 : 0;
  return *function == nullptr ? kNotFound : kSuccess;
}
int cuGetProcAddress(const char* symbol, void** function, int version, uint64_t flags) {
  return cuGetProcAddress_v2(symbol, function, version, flags, nullptr);
}
}
