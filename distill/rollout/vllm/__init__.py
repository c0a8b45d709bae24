"""vLLM servers that sample the student's answers, or score tokens with the teacher, over HTTP."""
