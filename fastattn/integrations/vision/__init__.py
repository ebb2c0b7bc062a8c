"""fastattn in the attention modules of timm, torchvision, open_clip and clip."""
