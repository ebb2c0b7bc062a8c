"""fastattn in models that were written for PyTorch: modules replaced in place, torch's functions patched."""

from fastattn.integrations.report import Replacement, Report
from fastattn.integrations.torch.patching import patch
from fastattn.integrations.torch.replacement import replace_attention

__all__ = ["Replacement", "Report", "patch", "replace_attention"]
