// Substitute for the CUDA driver's virtual memory functions, which uses host memory. An access to
// memory that is not mapped, or for which no access was set, ends the process.

#include <cuda.h>
#include <sys/mman.h>
#include <unistd.h>

#include <map>

namespace {

constexpr size_t kPiece = 4096;
size_t taken = 0, limit = ~size_t{0};
std::map<CUmemGenericAllocationHandle, size_t> sizes;
std::map<CUdeviceptr, size_t> reserved;

bool fits(const CUmemAllocationProp* p) {
    return p->type == CU_MEM_ALLOCATION_TYPE_PINNED &&
           p->requestedHandleTypes == CU_MEM_HANDLE_TYPE_NONE && !p->win32HandleMetaData &&
           p->location.type == CU_MEM_LOCATION_TYPE_DEVICE && p->location.id == 3 &&
           !p->allocFlags.compressionType && !p->allocFlags.usage;
}

void* at(CUdeviceptr address) {
    return reinterpret_cast<void*>(address);
}

CUresult done(bool good) {
    return good ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}

}  // namespace

extern "C" {

void stand_in_limit(size_t bytes) {
    limit = bytes;
}
size_t stand_in_taken() {
    return taken;
}
size_t stand_in_reserved() {
    return reserved.size();
}

CUresult CUDAAPI cuInit(unsigned int flags) {
    return done(flags == 0);
}

CUresult CUDAAPI cuDeviceGetAttribute(int* value, CUdevice_attribute attribute, CUdevice device) {
    *value = 1;
    return done(attribute == CU_DEVICE_ATTRIBUTE_VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED &&
                device == 3);
}

CUresult CUDAAPI cuMemGetAllocationGranularity(size_t* found, const CUmemAllocationProp* properties,
                                               CUmemAllocationGranularity_flags option) {
    *found = kPiece;
    return done(fits(properties) && option == CU_MEM_ALLOC_GRANULARITY_MINIMUM);
}

CUresult CUDAAPI cuMemAddressReserve(CUdeviceptr* address, size_t size, size_t alignment,
                                     CUdeviceptr wish, unsigned long long flags) {
    if (size == 0 || size % kPiece || alignment || wish || flags) return CUDA_ERROR_INVALID_VALUE;
    void* found = mmap(nullptr, size, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    *address = reinterpret_cast<CUdeviceptr>(found);
    reserved[*address] = size;
    return done(found != MAP_FAILED);
}

CUresult CUDAAPI cuMemAddressFree(CUdeviceptr address, size_t size) {
    if (!reserved.count(address) || reserved[address] != size) return CUDA_ERROR_INVALID_VALUE;
    reserved.erase(address);
    return done(munmap(at(address), size) == 0);
}

CUresult CUDAAPI cuMemCreate(CUmemGenericAllocationHandle* handle, size_t size,
                             const CUmemAllocationProp* properties, unsigned long long flags) {
    if (!fits(properties) || size % kPiece || flags) return CUDA_ERROR_INVALID_VALUE;
    if (taken + size > limit) return CUDA_ERROR_OUT_OF_MEMORY;
    *handle = memfd_create("piece", 0);
    sizes[*handle] = size;
    taken += size;
    return done(ftruncate(*handle, size) == 0);
}

CUresult CUDAAPI cuMemRelease(CUmemGenericAllocationHandle handle) {
    if (!sizes.count(handle)) return CUDA_ERROR_INVALID_VALUE;
    taken -= sizes[handle];
    sizes.erase(handle);
    return done(close(handle) == 0);
}

CUresult CUDAAPI cuMemMap(CUdeviceptr address, size_t size, size_t offset,
                          CUmemGenericAllocationHandle handle, unsigned long long flags) {
    if (!sizes.count(handle) || sizes[handle] != size || offset || flags)
        return CUDA_ERROR_INVALID_VALUE;
    return done(mmap(at(address), size, PROT_NONE, MAP_SHARED | MAP_FIXED, handle, 0) !=
                MAP_FAILED);
}

CUresult CUDAAPI cuMemUnmap(CUdeviceptr address, size_t size) {
    return done(mmap(at(address), size, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1,
                     0) != MAP_FAILED);
}

CUresult CUDAAPI cuMemSetAccess(CUdeviceptr address, size_t size, const CUmemAccessDesc* access,
                                size_t count) {
    if (count != 1 || access->location.type != CU_MEM_LOCATION_TYPE_DEVICE ||
        access->location.id != 3 || access->flags != CU_MEM_ACCESS_FLAGS_PROT_READWRITE)
        return CUDA_ERROR_INVALID_VALUE;
    return done(mprotect(at(address), size, PROT_READ | PROT_WRITE) == 0);
}
}
