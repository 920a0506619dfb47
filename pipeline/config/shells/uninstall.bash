complete -r gpt-oss-qat scripts/launch python python3 2>/dev/null
if [[ -n "${_GPT_OSS_QAT_EARLIER-}" ]]; then complete -F "$_GPT_OSS_QAT_EARLIER" python python3; fi
unset -f _gpt_oss_qat _gpt_oss_qat_complete _gpt_oss_qat_python
unset _GPT_OSS_QAT_EARLIER
