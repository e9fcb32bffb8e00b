"""Text from a trained model: sampling, cached decoding, samples and chat."""
