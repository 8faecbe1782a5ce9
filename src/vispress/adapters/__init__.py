"""Model families; importing this package registers the built-in adapters."""

from vispress.adapters import cohere2_vision as cohere2_vision
from vispress.adapters import fast_vlm as fast_vlm
from vispress.adapters import gemma3 as gemma3
from vispress.adapters import glm4v as glm4v
from vispress.adapters import idefics3 as idefics3
from vispress.adapters import internvl as internvl
from vispress.adapters import llava as llava
from vispress.adapters import llava_next as llava_next
from vispress.adapters import llava_next_video as llava_next_video
from vispress.adapters import llava_onevision as llava_onevision
from vispress.adapters import mistral3 as mistral3
from vispress.adapters import qwen3_5 as qwen3_5
from vispress.adapters import qwen_omni as qwen_omni
from vispress.adapters import qwen_vl as qwen_vl
from vispress.adapters import vipllava as vipllava
