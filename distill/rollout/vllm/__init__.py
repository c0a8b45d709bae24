"""vLLM servers that sample the student's responses, or score tokens with the teacher, over HTTP."""
