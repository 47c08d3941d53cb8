"""What makes data: folder layouts, LMDB writer, synthetic blur, the sample set."""
