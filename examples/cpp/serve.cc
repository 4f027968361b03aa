// Runs a model with bags in ONNX Runtime, with our kernels: serve <model> <library of lucid-onnx>
//
// The model takes indices and offsets, as `lucid-onnx build bag.onnx` or lucid_onnx.build_model
// writes it. Prints a line of numbers for each bag.
#include <onnxruntime_cxx_api.h>

#include <cstdint>
#include <cstdio>
#include <filesystem>
#include <string>
#include <vector>

namespace {

template <class T>
Ort::Value Tensor(std::vector<T>& values) {
  const int64_t shape[] = {static_cast<int64_t>(values.size())};
  const auto memory = Ort::MemoryInfo::CreateCpu(OrtDeviceAllocator, OrtMemTypeDefault);
  return Ort::Value::CreateTensor<T>(memory, values.data(), values.size(), shape, 1);
}

int Serve(const std::filesystem::path& model, const std::filesystem::path& library) {
  const Ort::Env env(ORT_LOGGING_LEVEL_WARNING, "serve");
  Ort::SessionOptions options;
  options.AddConfigEntry("lucid.max_output_bytes", "1000000");  // optional, before the library
  options.RegisterCustomOpsLibrary(library.c_str());
  Ort::Session session(env, model.c_str(), options);

  std::vector<int64_t> indices = {3, 1, 4}, offsets = {0, 2};  // two bags: [3, 1] and [4]
  const char* const inputs[] = {"indices", "offsets"};
  const char* const outputs[] = {"output"};
  Ort::Value values[] = {Tensor(indices), Tensor(offsets)};
  const std::vector<Ort::Value> results =
      session.Run(Ort::RunOptions(), inputs, values, 2, outputs, 1);

  const std::vector<int64_t> shape = results[0].GetTensorTypeAndShapeInfo().GetShape();
  const float* number = results[0].GetTensorData<float>();
  for (int64_t bag = 0; bag < shape[0]; ++bag) {
    for (int64_t i = 0; i < shape[1]; ++i) std::printf(i > 0 ? " %g" : "%g", *number++);
    std::printf("\n");
  }

  indices[2] = 1000000;  // outside of the table
  try {
    session.Run(Ort::RunOptions(), inputs, values, 2, outputs, 1);
  } catch (const Ort::Exception& error) {
    std::printf("%s\n", error.what());
    return 0;
  }
  std::printf("the bad index was not found: the library's kernels did not run\n");
  return 1;
}

}  // namespace

int main(int count, char** arguments) {
  if (count != 3) {
    std::fprintf(stderr, "usage: serve <model> <library>\n");
    return 2;
  }
  try {
    return Serve(arguments[1], arguments[2]);
  } catch (const Ort::Exception& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 1;
  }
}
