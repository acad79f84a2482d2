// Asking a Core ML bundle of `masters export --target coreml` from an application: iOS 18 or macOS 15 (Apple silicon) and later.
//
// Compile each package once (`xcrun coremlcompiler compile decoder.mlpackage .`), or add it to an Xcode project, which does that.
// A tokenizer that reads the bundle's tokenizer.json is swift-transformers' (AutoTokenizer.from(modelFolder:)).

import CoreML

struct VisionLanguageModel {
    let vision: MLModel, embedding: MLModel, decoder: MLModel
    let imageToken: Int32, endTokens: Set<Int32>  // masters.json: generation.image_token_id, generation.eos_token_ids

    init(folder: URL, imageToken: Int32, endTokens: Set<Int32>) throws {
        func load(_ name: String, _ units: MLComputeUnits) throws -> MLModel {
            let configuration = MLModelConfiguration()
            configuration.computeUnits = units
            return try MLModel(contentsOf: folder.appendingPathComponent("\(name).mlmodelc"), configuration: configuration)
        }
        vision = try load("vision_encoder", .cpuAndNeuralEngine)
        embedding = try load("embed_tokens", .cpuOnly)
        decoder = try load("decoder", .cpuAndGPU)  // its lengths vary, which the Neural Engine does not take
        self.imageToken = imageToken
        self.endTokens = endTokens
    }

    /// The token ids of the greedy answer, at most `limit`.
    ///
    /// `prompt` is the whole chat with each <image> expanded to the model's number of image tokens; `pixels` is one tile, 3 x side x side,
    /// resized, rescaled and normalised as preprocessor_config.json says.
    func answer(prompt: [Int32], pixels: [Float16], side: Int, limit: Int = 64) throws -> [Int32] {
        let images = MLShapedArray(scalars: pixels, shape: [1, 3, side, side])
        let features = try run(vision, ["images": MLFeatureValue(shapedArray: images)], "image_features").scalars
        let text = try embed(prompt)
        let width = text.shape[2]
        var rows = text.scalars
        for (index, position) in prompt.indices.filter({ prompt[$0] == imageToken }).enumerated() {
            rows.replaceSubrange(position * width..<(position + 1) * width, with: features[index * width..<(index + 1) * width])
        }

        let state = decoder.makeState()  // keyCache and valueCache, as long as the bundle's context
        var embeds = MLShapedArray(scalars: rows, shape: [1, prompt.count, width])
        var past = 0
        var tokens: [Int32] = []
        while tokens.count < limit {
            let new = embeds.shape[1], total = past + new
            // 0 where a position attends, -10,000 where the other lies in its future. The mask's shape tells the decoder where it stands.
            var mask = [Float16](repeating: 0, count: new * total)
            for row in 0..<new {
                for column in (past + row + 1)..<total { mask[row * total + column] = -10_000 }
            }
            let inputs = [
                "inputsEmbeds": MLFeatureValue(shapedArray: embeds),
                "causalMask": MLFeatureValue(shapedArray: MLShapedArray(scalars: mask, shape: [1, 1, new, total])),
            ]
            let logits = try run(decoder, inputs, "logits", state).scalars
            let token = Int32(logits.indices.max { logits[$0] < logits[$1] }!)
            if endTokens.contains(token) { break }
            tokens.append(token)
            past = total
            embeds = try embed([token])
        }
        return tokens
    }

    private func embed(_ ids: [Int32]) throws -> MLShapedArray<Float16> {
        try run(embedding, ["inputIds": MLFeatureValue(shapedArray: MLShapedArray(scalars: ids, shape: [1, ids.count]))], "inputsEmbeds")
    }

    private func run(_ model: MLModel, _ inputs: [String: MLFeatureValue], _ output: String, _ state: MLState? = nil) throws -> MLShapedArray<Float16> {
        let provider = try MLDictionaryFeatureProvider(dictionary: inputs)
        let result = try state.map { try model.prediction(from: provider, using: $0) } ?? model.prediction(from: provider)
        return MLShapedArray<Float16>(result.featureValue(for: output)!.multiArrayValue!)
    }
}
