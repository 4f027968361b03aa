// The ceiling that tools/gpu_check.py measures: random rows are read, and nearly nothing is done with
// them. A thread reads one vector of 16 bytes of eight rows, which is how the kernels read them, but
// knows where they are at once. tools/gather.ptx is this file, compiled:
//   nvcc -O3 -arch=compute_75 -ptx tools/gather.cu -o tools/gather.ptx
// but for its .version, 7.0, which older drivers know too.
extern "C" __global__ void __launch_bounds__(256)
    gather(const uint4* table, const long long* indices, long long groups, unsigned vectors,
           uint4* output) {
  const long long thread = static_cast<long long>(blockIdx.x) * blockDim.x + threadIdx.x;
  const long long group = thread / vectors;
  if (group >= groups) return;
  const unsigned vector = static_cast<unsigned>(thread - group * vectors);
  uint4 sum = {0, 0, 0, 0};
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const uint4 x = __ldg(table + __ldg(indices + group * 8 + i) * vectors + vector);
    sum.x ^= x.x;
    sum.y ^= x.y;
    sum.z ^= x.z;
    sum.w ^= x.w;
  }
  output[thread] = sum;
}
