"""Llama 1, 2, 3, 3.1, 3.2, 3.3: grouped queries, rope scaling, tied or untied embeddings."""

from primus_bridge.conversion.config_json import decoder_architecture
from primus_bridge.conversion.families import Family
from primus_bridge.conversion.families.tables import DECODER

FAMILIES = (Family("Llama 1, 2, 3, 3.1, 3.2, 3.3", "llama", DECODER, decoder_architecture),)
